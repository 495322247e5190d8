"""Options from flags and files: what parses, what is refused and how it is said, and that everything shipped agrees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

import train
from fsdp_qlora.config.compat import COMPATIBILITY
from fsdp_qlora.config.files import save
from fsdp_qlora.config.help import help_text, markdown
from fsdp_qlora.config.option import REQUIRED, show
from fsdp_qlora.config.options import OPTIONS, Config
from fsdp_qlora.config.parse import parse, parse_record
from fsdp_qlora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODEL = ["--model_name", "m"]


def flat(*argv: str) -> dict:
    return parse([*MODEL, *argv]).to_flat()


def mistakes(*argv: str, model: bool = True) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse([*(MODEL if model else []), *argv])
    return str(caught.value).splitlines()


def file(tmp_path: Path, text: str, name: str = "run.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_the_70b_command_of_fsdp_qlora_parses_as_it_is():
    command = (
        "--model_name meta-llama/Llama-2-70b-hf --batch_size 2 --context_length 512 --precision bf16 "
        "--train_type qlora --use_gradient_checkpointing true --use_cpu_offload true --dataset alpaca "
        "--reentrant_checkpointing true"
    )
    asked = {
        "model_name": "meta-llama/Llama-2-70b-hf",
        "batch_size": 2,
        "context_length": 512,
        "precision": "bf16",
        "train_type": "qlora",
        "use_gradient_checkpointing": True,
        "use_cpu_offload": True,
        "dataset": "alpaca",
        "reentrant_checkpointing": True,
    }
    defaults = {name: option.default for name, option in OPTIONS.items() if option.default is not REQUIRED}
    assert parse(command.split()).to_flat() == defaults | asked


@pytest.mark.parametrize(
    "argv", ["--use_cpu_offload true", "--use-cpu-offload=TRUE", "--use_cpu_offload", "--use_cpu_offload --seed 42"]
)
def test_ways_to_say_true(argv):
    assert flat()["use_cpu_offload"] is None
    assert flat(*argv.split())["use_cpu_offload"] is True


def test_ways_to_say_a_list_a_number_and_null():
    assert flat("--log-to", "stdout,wandb")["log_to"] == ["stdout", "wandb"]
    assert flat("--log_to", "stdout", "wandb", "--seed=0")["log_to"] == ["stdout", "wandb"]
    assert flat("--lora_target_modules=q_proj,.*mlp.*")["lora_target_modules"] == ["q_proj", ".*mlp.*"]
    assert flat("--max_steps", "-1")["max_steps"] == -1
    assert flat("--lr", "3e-4")["lr"] == 3e-4
    assert flat("--dataset_samples", "null")["dataset_samples"] is None


@pytest.mark.parametrize(("alias", "meant"), [("custom_lora", "lora"), ("custom_qlora", "qlora")])
def test_train_type_aliases(alias, meant):
    assert flat("--train_type", alias)["train_type"] == meant


def test_options_of_one_value_are_accepted_and_shown_nowhere(tmp_path):
    accepted = ["--low_memory", "--llama_pro_path", "null"]
    assert parse([*MODEL, *accepted]) == parse(MODEL)
    assert parse(["--config", file(tmp_path, "low_memory: true\nllama_pro_path: null\n"), *MODEL])
    save(parse(MODEL), tmp_path / "config.yaml")
    for name in COMPATIBILITY:
        assert name not in OPTIONS
        assert all(name not in text for text in (help_text(), markdown(), (tmp_path / "config.yaml").read_text()))


@pytest.mark.parametrize("alias", ["bits", "n_bit", "load_in_4bit"])
def test_the_width_of_a_base_is_found_by_other_names(alias):
    assert mistakes(f"--{alias}", "4") == [f"--{alias} 4: there is no such option; did you mean n_bits?"]


def test_flags_go_over_the_file_and_the_file_over_defaults(tmp_path):
    path = file(tmp_path, "model_name: from_file\nlr: 3e-4\nlora-rank: 8\nuse_cpu_offload: yes\nlog_to: [stdout]\n")
    values = parse(["--config", path, "--lora_rank", "4"]).to_flat()
    picked = [values[name] for name in ("model_name", "lr", "lora_rank", "use_cpu_offload", "log_to", "lora_alpha")]
    assert picked == ["from_file", 3e-4, 4, True, ["stdout"], 16.0]
    assert isinstance(values["lr"], float)


def test_yaml_and_json_say_the_same(tmp_path):
    values = {"model_name": "m", "lr": 3e-4, "use_cpu_offload": True, "log_to": ["stdout", "tqdm"], "revision": None}
    from_yaml = parse(["--config", file(tmp_path, yaml.safe_dump(values))])
    from_json = parse(["--config", file(tmp_path, json.dumps(values, indent=1), "run.json")])
    assert from_yaml == from_json == Config.from_flat(values)


def test_a_text_option_takes_what_yaml_would_turn_into_something_else(tmp_path):
    path = file(tmp_path, "model_name: 2024\nlog_to: wandb\nname: off\ngroup: 'null'\n")
    values = parse(["--config", path]).to_flat()
    assert (values["model_name"], values["name"], values["group"]) == ("2024", "off", "null")


@pytest.mark.parametrize("word", ["null", "none", "None", "NULL"])
def test_nothing_is_said_alike_in_flags_and_in_files(tmp_path, word):
    assert flat("--rows_cache", word)["rows_cache"] is None
    assert flat("--config", file(tmp_path, f"rows_cache: {word}\n"))["rows_cache"] is None
    assert flat("--config", file(tmp_path, f"rows_cache: '{word}'\n"))["rows_cache"] == word


def test_the_line_break_of_a_yaml_block_is_no_part_of_its_text(tmp_path):
    assert flat("--config", file(tmp_path, "dataset: >\n  a.jsonl,\n  b.jsonl\n"))["dataset"] == "a.jsonl, b.jsonl"


def test_a_home_folder_is_found_in_files_and_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = file(
        tmp_path, "model_name: ~/model\noutput_dir: ~/out\ndataset: ~/a.jsonl,~/b.jsonl\nprofiling_output: x~y\n"
    )
    values = parse(["--config", path, "--profile", "--rows_cache=~/cache"]).to_flat()
    names = ("model_name", "output_dir", "dataset", "profiling_output", "rows_cache")
    asked = ["/home/me/model", "/home/me/out", "/home/me/a.jsonl,/home/me/b.jsonl", "x~y", "/home/me/cache"]
    assert [values[name] for name in names] == asked


@pytest.mark.parametrize(("name", "text"), [("run.json", '{"seed": 7}'), ("run.yaml", "seed: 7\n")])
def test_a_byte_order_mark_is_no_mistake(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert parse(["--config", str(path), *MODEL]).training.seed == 7


def test_a_whole_number_may_be_written_with_a_point_and_zeros():
    assert flat("--num_epochs", "3.0")["num_epochs"] == 3
    assert flat("--max_steps", "-1.")["max_steps"] == -1


def test_other_names_of_precisions():
    assert flat("--precision", "bfloat16")["precision"] == "bf16"
    assert flat("--precision", "float32")["precision"] == "fp32"


def test_an_empty_file_gives_nothing(tmp_path):
    assert parse(["--config", file(tmp_path, "# nothing\n"), *MODEL]) == parse(MODEL)


# one line each: argv, then words that its only mistake must contain
REFUSED = [
    ("--lora_rnk 8", ["--lora_rnk 8", "no such option", "lora_rank"]),
    ("--learning-rate 1", ["--learning-rate 1", "no such option", "mean lr?"]),
    ("--resume_from_checkpoint x", ["no such option", "did you mean resume?"]),
    (
        "--save_total_limit 2",
        ["--save_total_limit 2", "has no effect with save_steps null", "set save_steps to a number"],
    ),
    ("--val_set_size 0.1", ["no such option", "did you mean eval_fraction?"]),
    ("--evaluation_strategy steps", ["no such option", "--eval_dataset, --eval_fraction or --eval_samples"]),
    ("--load_best_model_at_end true", ["no such option", "did you mean save_best?"]),
    ("--per_device_eval_batch_size 1", ["no such option", "as many tokens at a time as a micro-batch"]),
    ("--eval_fraction 0", ["--eval_fraction 0", "above 0 and below 1"]),
    ("--eval_fraction 1", ["--eval_fraction 1", "above 0 and below 1"]),
    ("--eval_steps 5", ["--eval_steps 5: has no effect", "set eval_dataset, eval_fraction or eval_samples"]),
    ("--save_best", ["--save_best: has no effect", "set eval_dataset, eval_fraction or eval_samples"]),
    ("--early_stopping_patience 2", ["has no effect", "set eval_dataset, eval_fraction or eval_samples"]),
    ("--eval_samples 9 --eval_steps -1 --save_best", ["--save_best: has no effect with --eval_steps -1"]),
    ("--eval_samples 9 --eval_steps -1 --early_stopping_patience 2", ["has no effect with --eval_steps -1"]),
    ("--eval_samples 9 --save_best --save_model false", ["--save_best: has no effect with --save_model false"]),
    ("--eval_dataset a.jsonl --eval_fraction 0.1", ["one brings other rows", "give one of them"]),
    ("--eval_samples 9 --eval_fraction 0.1", ["both say how many training rows", "give one of them"]),
    ("--eval_dataset dummy", ["dummy rows are random", "eval_fraction or eval_samples"]),
    ("--dataset dummy --eval_dataset a.jsonl", ["dummy rows are random", "eval_fraction or eval_samples"]),
    ("--local-rank 0", ["--local-rank 0", "no such option", "torchrun tells each process who it is"]),
    ("--fp16 true", ["no such option", "use --precision fp16_autocast"]),
    ("--save_strategy steps", ["no such option", "use --save_steps", "the adapter is saved at the end"]),
    ("--warmup_steps 10", ["no such option", "use --warmup_ratio"]),
    ("--precision fp16", ["--precision fp16", "use fp16_autocast, which cards without bfloat16 (T4, V100) can run"]),
    ("--precision float16", ["use fp16_autocast"]),
    ("--num_epochs 2.5", ["--num_epochs 2.5", "a whole number"]),
    ("--zzzzzz", ["--zzzzzz", "no such option", "--help"]),
    ("--target_modules q k v", ["--target_modules q k v", "lora_target_modules"]),
    ("--lr fast", ["--lr fast", "a number above 0"]),
    ("--lr 0", ["--lr 0", "a number above 0"]),
    ("--lr nan", ["--lr nan", "a number above 0"]),
    ("--lr inf", ["--lr inf", "a number above 0"]),
    ("--batch_size 1.5", ["--batch_size 1.5", "a whole number of rows, at least 1"]),
    ("--batch_size -2", ["--batch_size -2", "at least 1"]),
    ("--max_steps 0", ["--max_steps 0", "-1 (no limit)"]),
    ("--max_steps -2", ["--max_steps -2", "-1 (no limit)"]),
    ("--lora_dropout 1", ["--lora_dropout 1", "at least 0 and below 1"]),
    ("--warmup_ratio 1.1", ["--warmup_ratio 1.1", "at least 0 and at most 1"]),
    ("--wd -0.1", ["--wd -0.1", "at least 0"]),
    ("--master_port 70000", ["--master_port 70000", "at most 65535"]),
    ("--use_cpu_offload maybe", ["--use_cpu_offload maybe", "true or false"]),
    ("--seed null", ["--seed null", "a whole number"]),
    ("--precision bf17", ["--precision bf17", "did you mean bf16?", "fp32, bf16, fp16_autocast"]),
    ("--optimizer adamv", ["did you mean adam", "adadelta"]),
    ("--log_to tqdm,wandbb", ["'wandbb'", "did you mean wandb?"]),
    ("--log_to tqdm,tqdm", ["--log_to tqdm,tqdm", "twice"]),
    ("--log_to=", ["--log_to", "needs a value"]),
    ("--lr", ["--lr", "needs a value", "a number above 0"]),
    ("--config", ["--config", "needs a value", "YAML"]),
    ("--lr 1 --lr 2", ["--lr 2", "twice", "--lr 1"]),
    ("--lora_rank 1 --lora-rank 2", ["--lora-rank 2", "twice"]),
    ("run.yaml", ["run.yaml", "did you mean --config run.yaml?"]),
    ("-v", ["-v", "belongs to no option"]),
    ("-lr 3", ["-lr 3: belongs to no option; options are written --name value; did you mean --lr?"]),
    ("-lora-rank=3", ["did you mean --lora_rank?"]),
    ("\u2014lr 3", ["\u2014lr 3: belongs to no option", "did you mean --lr?"]),
    ("--lora_target_modules q_proj -lr 3", ["-lr 3: belongs to no option"]),
    ("--batch 2", ["--batch 2: there is no such option; did you mean batch_size?"]),
    ("--hqq 2", ["did you mean hqq_group_size or hqq_axis or hqq_optimize?"]),
    ("--e 2", ["no such option; --help lists all"]),
    *[
        (f"--{written}", [f"--{written}: there is no such option; use --{meant}"])
        for written, meant in {
            "no_save_model": "save_model false",
            "nosave_model": "save_model false",
            "no-gradient-checkpointing": "use_gradient_checkpointing false",
            "no_fused": "fused false",
            "no_rows_cache": "rows_cache null",
        }.items()
    ],
    ("--no_lr", ["--no_lr", "no such option; --help lists all"]),
    ("--load_in_4bit true", ["did you mean n_bits? It takes one of 8, 4, 3, 2, 1, or null"]),
    ("--use_flash_attention true", ["did you mean attention? It takes one of auto, sdpa, flash_attention_2, eager"]),
    ("--config none.yaml", ["none.yaml", "No such file"]),
    *[(f"--train_type {name}", [name, "not built yet"]) for name in ("full", "bnb_llama_pro", "hqq_llama_pro")],
    ("--train_type qlor", ["--train_type qlor", "did you mean qlora?"]),
    ("--llama_pro_path x", ["--llama_pro_path x", "block expansion (Llama-Pro) is known but not built yet; omit it"]),
    ("--low_memory false", ["--low_memory false", "not built yet"]),
    *[
        (
            f"--n_bits {bits} --train_type qlora",
            [f"--n_bits {bits}", "--train_type qlora", "NF4 has 4 bits", "hqq_lora"],
        )
        for bits in (1, 2, 3, 8)
    ],
    ("--n_bits 3", ["--n_bits 3", "train_type qlora (its default)", "hqq_lora"]),
    ("--n_bits 5", ["--n_bits 5", "give one of 8, 4, 3, 2, 1"]),
    *[
        (f"--{option} --train_type {kind}", [f"--{option}: has no effect with --train_type {kind}", "to hqq_lora"])
        for option in ("hqq_group_size 64", "hqq_axis 0", "hqq_axis 1", "hqq_optimize true")
        for kind in ("qlora", "lora")
    ],
    ("--hqq_group_size 16 --train_type hqq_lora", ["--hqq_group_size 16", "one of 32, 64, 128"]),
    ("--hqq_axis 2 --train_type hqq_lora", ["--hqq_axis 2", "one of 1, 0"]),
    ("--double_quant true --train_type hqq_lora", ["--double_quant true", "no effect", "--train_type hqq_lora"]),
    ("--sharding_strategy ddp --use_cpu_offload", ["--use_cpu_offload", "--sharding_strategy ddp", "full_shard"]),
    (
        "--reentrant_checkpointing true --use_gradient_checkpointing false",
        ["--reentrant_checkpointing true", "no effect", "--use_gradient_checkpointing false"],
    ),
    ("--grad_norm 1.0 --apply_gradient_clipping false", ["--grad_norm 1.0", "no effect", "apply_gradient_clipping"]),
    *[(f"--{name} x", [f"--{name} x", "no effect", "wandb"]) for name in ("group", "entity", "name", "project_name")],
    ("--hybrid_shard_size 2", ["--hybrid_shard_size 2", "no effect", "hybrid_full_shard"]),
    ("--double_quant true --train_type lora", ["--double_quant true", "no effect", "--train_type lora"]),
    ("--n_bits 4 --train_type lora", ["--n_bits 4", "no effect", "--train_type lora"]),
    *[(f"--{name}", [f"--{name}", "no effect", "profile"]) for name in ("with_stack", "with_shapes", "export_trace")],
    ("--export_memory_timeline", ["no effect", "profile"]),
    ("--profile_memory", ["no effect", "profile"]),
    ("--profiling_output x", ["--profiling_output x", "no effect", "profile"]),
    ("--columns q", ["--columns q", "write FIELD=COLUMN", "instruction"]),
    ("--columns instructions=q", ["--columns instructions=q", "write FIELD=COLUMN"]),
    ("--columns question=q,answer=q", ["--columns question=q,answer=q", "each field and each column once"]),
    *[
        (f"--dataset dummy --{given}", [f"--{given}: has no effect with --dataset dummy"])
        for given in ("train_on_prompt", "rows_cache x", "dataset_format text")
    ],
    ("--text_overflow cut --dataset dummy", ["--text_overflow cut", "no effect", "--dataset dummy"]),
    ("--chat_template a --prompt_template b", ["--chat_template a", "no effect", "--prompt_template b"]),
    ("--bad_rows skipp", ["--bad_rows skipp", "did you mean skip?"]),
    ("--no_sync", ["--no_sync", "no effect", "gradient_accumulation_steps 1"]),
    ("--warmup_ratio 0.1 --lr_scheduler constant", ["--warmup_ratio 0.1", "no effect", "constant"]),
    (
        "--attention flash_attention_2 --precision fp32",
        ["--attention flash_attention_2", "--precision fp32", "16 bits"],
    ),
    ("--lora_target_modules all,q_proj", ["all,q_proj", "already includes"]),
    (
        "--sharding_strategy hybrid_full_shard --world_size 4 --hybrid_shard_size 3",
        ["--world_size 4", "--hybrid_shard_size 3", "multiple"],
    ),
]


def test_a_variable_in_a_path_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    text = "model_name: ${SCRATCH}/model\noutput_dir: $SCRATCH/out\ndataset: a.jsonl,$SCRATCH/b.jsonl\nname: $SCRATCH\n"
    values = parse(["--config", file(tmp_path, text), "--log_to", "wandb"]).to_flat()
    asked = ["/scratch/me/model", "/scratch/me/out", "a.jsonl,/scratch/me/b.jsonl", "$SCRATCH"]
    assert [values[name] for name in ("model_name", "output_dir", "dataset", "name")] == asked


def test_a_variable_that_is_not_set_is_a_mistake_and_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    (line,) = mistakes("--output_dir", "${NOWHERE}/out")
    assert (
        line
        == "--output_dir ${NOWHERE}/out: ${NOWHERE} is not set in the environment; set it, or write the path itself"
    )
    (tmp_path / "a$b").mkdir()
    assert flat("--output_dir", "a$b")["output_dir"] == "a$b"


@pytest.mark.parametrize(("argv", "words"), REFUSED, ids=[argv for argv, _ in REFUSED])
def test_one_mistake_is_one_line_that_names_it(argv, words):
    (line,) = mistakes(*argv.split())
    for word in words:
        assert word in line


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--model", "--modelname"])
def test_a_required_option_by_another_name_is_one_mistake(flag):
    assert mistakes(flag, "m", model=False) == [f"{flag} m: there is no such option; did you mean model_name?"]


def test_a_missing_model_name_is_one_mistake():
    (line,) = mistakes("--lr", "1e-4", model=False)
    assert "model_name" in line
    assert "required" in line


@pytest.mark.parametrize(
    "argv",
    [
        "--with_stack false",
        "--reentrant_checkpointing false --use_gradient_checkpointing false",
        "--double_quant false --train_type lora",
        "--apply_gradient_clipping false",
        "--train_type lora",
        "--train_type qlora --n_bits 4",
        "--train_type qlora --hqq_optimize false",
        *(f"--train_type hqq_lora --n_bits {bits} --hqq_axis 0 --hqq_group_size 32" for bits in (8, 4, 3, 2, 1)),
        "--lr_scheduler constant",
        "--log_to wandb --group x --entity y --name z",
        "--profile --with_stack --export_trace",
        "--sharding_strategy hybrid_full_shard --hybrid_shard_size 2 --world_size 4",
    ],
)
def test_asking_for_nothing_or_for_what_is_on_is_no_mistake(argv):
    flat(*argv.split())


def test_all_mistakes_are_reported_together(tmp_path):
    text = (
        "model_name: m\nlora_rnk: 8\nlr: fast\nlr: 1\ntraining:\n  wd: 0\nprecision: bf17\ngroup: x\nlow_memory: no\n"
    )
    path = file(tmp_path, text)
    lines = mistakes(
        "--config", path, "--batch_size", "0", "--dropot=1", "--use_cpu_offload", "no", "stray", model=False
    )
    starts = [
        "stray: ",
        f"training ({path}, line 5): ",
        f"lr: 1 ({path}, line 4): lr is given twice",
        f"lora_rnk: 8 ({path}, line 2): there is no such option",
        f"lr: fast ({path}, line 3): ",
        f"precision: bf17 ({path}, line 7): ",
        f"low_memory: no ({path}, line 9): ",
        "--batch_size 0: ",
        "--dropot=1: ".replace("=", " "),
        f"group: x ({path}, line 8): has no effect",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.yaml", "lr: 1\nlog_to: [a, b\nseed: 1\n", ["malformed YAML at line 3"]),
        ("run.yaml", "lr: 1\n\tseed: 2\n", ["malformed YAML at line 2"]),
        ("run.yaml", "- lr\n- seed\n", ["must be a mapping"]),
        ("run.yaml", "just text", ["must be a mapping"]),
        ("run.json", '{"lr": 1,\n "seed" 2}', ["malformed JSON at line 2, column 9"]),
        ("run.yaml", f"lr: {'[' * 50_000}", ["too deep in one another"]),
        ("run.json", f'{{"lr": {"[" * 100_000}', ["too deep in one another"]),
        ("run.json", "[1]", ["must be an object"]),
        ("run.toml", "lr = 1\n[model]\n", ["TOML is not read; give a YAML or JSON file"]),
    ],
)
def test_a_malformed_file_is_one_mistake_with_its_place(tmp_path, name, text, words):
    (line,) = mistakes("--config", file(tmp_path, text, name), model=False)
    assert name in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.json", '{"seed": 1, "seed": 2}', ["seed: 2", "twice"]),
        ("run.json", '{"training": {"seed": 1}}', ["training", "flat"]),
        ("run.json", '{"batch_size": true}', ["batch_size: true", "whole number"]),
        ("run.yaml", "seed: null\n", ["seed: null", "whole number"]),
        ("run.yaml", "seed: [1, 2]\n", ["seed: [1, 2]", "not a list"]),
        ("run.yaml", "log_to: []\n", ["log_to: []", "empty"]),
        ("run.yaml", "columns: {output: a}\n", ["columns", "takes no mapping", "give a list of names"]),
        ("run.yaml", "rows_cache: '  '\n", ["rows_cache", "needs a value"]),
        ("run.yaml", "? [lr, seed]\n: 3\n", ["run.yaml, line 1: is no option's name"]),
        ("run.yaml", "lr: 1\n<<: {seed: 3}\n", ["run.yaml, line 2: is no option's name"]),
        ("run.yaml", "model-name: x\nmodel_name: y\n", ["model_name: y", "line 2", "twice", "line 1"]),
    ],
)
def test_a_mistake_in_a_file(tmp_path, name, text, words):
    (line,) = mistakes("--config", file(tmp_path, text, name))
    for word in words:
        assert word in line


def test_a_flag_that_makes_a_files_option_idle_says_both(tmp_path):
    path = file(tmp_path, "model_name: m\ngrad_norm: 0.3\n")
    (line,) = mistakes("--config", path, "--apply_gradient_clipping", "false", model=False)
    assert f"grad_norm: 0.3 ({path}, line 2)" in line
    assert "--apply_gradient_clipping false" in line


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--train_type lora --double_quant false --lr 1.2345678901234567e-05 --apply_gradient_clipping false",
        "--log_to wandb,stdout --group null --name 1e3 --entity true --lora_target_modules .*[qk]_proj,mlp.up_proj",
        "--dataset_samples 5 --lr_scheduler constant --no_sync --gradient_accumulation_steps 2 --wd 1e-20",
        "--profile --with_stack --sharding_strategy hybrid_shard_grad_op --hybrid_shard_size 2 --seed 4294967295",
    ],
)
def test_a_saved_config_reads_back_the_same(tmp_path, argv):
    config = parse([*MODEL, *argv.split()])
    path = tmp_path / "new" / "config.yaml"
    save(config, path)
    assert parse(["--config", str(path)]) == config
    assert all(f"{name}: " in path.read_text() for name in OPTIONS)


def test_texts_that_yaml_could_mistake_survive_saving(tmp_path):
    names = {
        "model_name": "a: b # c",
        "name": "null",
        "group": "1_0",
        "project_name": "None",
        "entity": "käse 'x\"",
        "log_to": ["wandb"],
    }
    save(Config.from_flat(names), tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == Config.from_flat(names)


def test_saving_replaces_whole_files_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    save(parse([*MODEL, "--seed", "1"]), path)
    before = path.read_text()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        save(parse([*MODEL, "--seed", "2"]), path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_what_it_needs(path):
    text = path.read_text()
    config = parse(["--config", str(path)])
    for name, value in yaml.safe_load(text).items():
        kept = config.to_flat()[name]
        assert kept == (float(value) if isinstance(kept, float) else value)
    for word in ("# Hardware", "# Command", "# Memory", "# Time", f"--config configs/{path.name}"):
        assert word in text


def test_the_configs_promised_are_there():
    assert {"llama2_70b_2x24gb", "llama3_8b_1x24gb", "tiny_cpu"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", [*OPTIONS, *COMPATIBILITY, "config", "help"])
def test_torchrun_leaves_every_option_after_the_script_to_us(name):
    for spelling in (name, name.replace("_", "-")):
        ours = [f"--{spelling}", "1"]
        args = get_args_parser().parse_args(["--nproc_per_node", "2", "train.py", *ours])
        assert (args.nproc_per_node, args.training_script, args.training_script_args) == ("2", "train.py", ours)


@pytest.mark.parametrize("width", [50, 80, 110])
def test_help_is_wrapped_and_whole(width):
    text = help_text(width)
    long = [line for line in text.splitlines() if len(line) > width and not line.startswith("usage:")]
    assert not long
    words = " ".join(text.split())
    for name, option in OPTIONS.items():
        assert f"--{name} " in words
        assert option.spec.meaning in words
        assert all(str(choice) in words for choice in option.choices)
        assert option.default is REQUIRED or f"default {show(option.default)}; " in words


def test_help_exits_0_in_spite_of_mistakes(capsys):
    assert train.main(["--no_such_thing", "--help"]) == 0
    assert "--lora_rank" in capsys.readouterr().out


def test_every_option_says_what_why_and_at_what_price():
    for option in OPTIONS.values():
        assert option.spec.meaning.endswith(".")
        assert not option.spec.price.startswith("none")
        assert option.spec.why or option.default is REQUIRED
        if option.default is not REQUIRED and option.default is not None:
            assert option.read(show(option.default)) == option.default


def test_options_page_is_up_to_date():
    assert (ROOT / "docs" / "options.md").read_text() == markdown() + "\n", (
        "run: python -m fsdp_qlora.config.help > docs/options.md"
    )


def test_reading_options_imports_nothing_heavy():
    code = "import sys, fsdp_qlora.config.parse; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_a_run_wrote_down_is_read_though_rules_have_changed_since(tmp_path):
    """A run's own file may have options that would have no effect now: an adapter must not be lost for that."""
    file = tmp_path / "config.yaml"
    file.write_text("model_name: here\neval_steps: 0\nlora_rank: 4\n")
    assert parse_record(str(file)).adapter.lora_rank == 4
    with pytest.raises(UserError, match="has no effect"):
        parse(["--config", str(file)])
    file.write_text("model_name: here\nlora_rank: many\n")
    with pytest.raises(UserError, match="lora_rank"):
        parse_record(str(file))
