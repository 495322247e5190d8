"""Checkpoints in every form that transformers opens: the same tensors are read, or one line says why not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import train
from fsdp_qlora.skeleton import max_positions, read_config
from tests import plain, tiny
from tests.as_peft import assert_trains_as_peft
from tests.built import Built, built
from tests.runs import flags

OPTIONS = {"dataset": "dummy", "train_type": "lora", "precision": "fp32", "lora_rank": 2, "context_length": 32}
TIED = {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

pytestmark = pytest.mark.usefixtures("one_thread")


def llama(folder: Path, **more: object) -> Path:
    return tiny.save_model(LlamaConfig(**tiny.SHAPE | more), folder)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a one-file checkpoint, or replace them where `change` returns others."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, file, metadata={"format": "pt"})


def pickled(folder: Path, **saving: Any) -> None:
    """Replace a checkpoint by a pytorch_model.bin of the same tensors, tied ones included as PyTorch keeps them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", **saving)
    (folder / "model.safetensors").unlink()


def frozen(ours: Built) -> dict[str, Tensor]:
    """Name in the model -> tensor, of everything that was read."""
    return {
        source: unit.frozen.decode(entry, torch.float32).clone()
        for unit in ours.model.units
        for entry, source in unit.sources.items()
    }


def assert_reads_what_transformers_reads(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    with built(OPTIONS | {"model_name": folder}) as ours:
        found = frozen(ours)
        if ours.model.is_tied():
            found[HEAD] = found[EMBEDDING]
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(found[name], tensor), name


def refused(folder: Path, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    """The one line that the program ends with."""
    code = train.main(flags(OPTIONS | {"model_name": folder, "output_dir": folder.parent / "out"} | options))
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if "model_name" in line]
    assert code == 2
    assert len(lines) == 1, said
    assert not any("Traceback" in line for line in said)
    return lines[0]


# --- names


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def head_alone(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def old_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("norm.weight", "norm.gamma"): t for name, t in tensors.items()}


@pytest.mark.parametrize("change", [without_prefix, head_alone])
@pytest.mark.parametrize("tied", [True, False])
def test_names_are_taken_as_transformers_takes_them(change, tied, tmp_path):
    if change is head_alone and not tied:
        pytest.skip("an embedding that is not there")
    rewrite(llama(tmp_path, tie_word_embeddings=tied), change)
    assert_reads_what_transformers_reads(tmp_path)


@pytest.mark.parametrize(("family", "old"), [("GPTNeoX", "embed_out."), ("Exaone", "transformer.h.0.attn.")])
def test_families_that_transformers_renames_are_read(family, old, tmp_path):
    tiny.save_model(getattr(transformers, f"{family}Config")(**tiny.SHAPE), tmp_path)
    assert any(name.startswith(old) for name in load_file(tmp_path / "model.safetensors")), "saved under the new names"
    assert_reads_what_transformers_reads(tmp_path)


def test_an_embedding_that_is_only_there_as_the_head_is_missing_where_the_two_are_not_tied(tmp_path, capsys):
    rewrite(llama(tmp_path / "model"), lambda tensors: tensors.pop(EMBEDDING))
    assert f"missing: {EMBEDDING}" in refused(tmp_path / "model", capsys)


BUFFERS = {
    "Apertus": ({}, "mlp.act_fn.beta"),
    "Gemma4Text": ({"head_dim": 16, "hidden_size_per_layer_input": 0} | TIED, "layer_scalar"),
}


@pytest.mark.parametrize("family", BUFFERS)
def test_persistent_buffers_are_read(family, tmp_path):
    more, buffer = BUFFERS[family]
    tiny.save_model(getattr(transformers, f"{family}Config")(**tiny.SHAPE | more), tmp_path)
    before = load_file(tmp_path / "model.safetensors")[f"model.layers.1.{buffer}"]
    rewrite(tmp_path, lambda tensors: tensors[f"model.layers.1.{buffer}"].fill_(0.375))
    assert before.item() != 0.375
    assert_reads_what_transformers_reads(tmp_path)
    assert_trains_as_peft(tmp_path, "lora")


def test_a_buffer_that_is_not_in_the_checkpoint_is_missing(tmp_path, capsys):
    """transformers leaves it as its memory happens to be."""
    tiny.save_model(transformers.ApertusConfig(**tiny.SHAPE), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("act_fn.beta")})
    assert "missing: model.layers.0.mlp.act_fn.beta" in refused(tmp_path / "model", capsys)


# --- tensors beyond the model's

EXTRA = {
    "a value head": {"v_head.summary.weight": torch.ones(1, 64)},
    "a layer for several tokens": {
        "model.mtp_layers.0.up_proj.weight": torch.ones(8, 8),
        "mtp.norm.weight": torch.ones(8),
    },
    "a layer beyond the last": {"model.layers.3.self_attn.q_proj.weight": torch.ones(64, 64)},
    "masks": {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)},
}


@pytest.mark.parametrize("kind", EXTRA)
def test_tensors_that_transformers_ignores_are_named_once_and_not_read(kind, tmp_path, capsys):
    rewrite(llama(tmp_path), lambda tensors: tensors.update(EXTRA[kind]))
    assert_reads_what_transformers_reads(tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "not read, as by transformers" in line]
    assert len(said) == 1
    assert all(name in said[0] for name in EXTRA[kind])


def test_rotary_tables_of_old_checkpoints_are_not_worth_a_word(tmp_path, capsys):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(llama(tmp_path), lambda tensors: tensors.update(table))
    assert_reads_what_transformers_reads(tmp_path)
    assert "not read" not in capsys.readouterr().out


def test_a_bias_that_the_config_denies_is_refused(tmp_path, capsys):
    bias = "model.layers.0.self_attn.q_proj.bias"
    rewrite(llama(tmp_path / "model"), lambda tensors: tensors.update({bias: torch.ones(64)}))
    assert f"{bias}, of which its config.json knows nothing" in refused(tmp_path / "model", capsys)


# --- the head


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("differs", [True, False])
def test_a_tied_head_that_is_there_as_well_is_compared(differs, prefix, tmp_path, capsys):
    def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = tensors[EMBEDDING] + (1e-3 if differs else 0)
        return {n.replace("model.", prefix): t for n, t in tensors.items()} | {HEAD: head}

    rewrite(llama(tmp_path, **TIED), add)
    assert_reads_what_transformers_reads(tmp_path)
    said = capsys.readouterr().out.count("has a head of its own though its config ties it")
    with built(OPTIONS | {"model_name": tmp_path}) as ours:
        assert ours.model.is_tied() == (not differs)
    assert said == differs
    assert_trains_as_peft(tmp_path, "lora")


def test_a_head_of_another_shape_is_refused(tmp_path, capsys):
    rewrite(llama(tmp_path / "model", **TIED), lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:260].clone()}))
    assert f"{HEAD} is [260, 64] and should be [264, 64]" in refused(tmp_path / "model", capsys)


def test_a_head_in_4_bits_is_decoded(tmp_path):
    llama(tmp_path / "model")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["nothing"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, device_map=str(plain.DEVICE), quantization_config=settings
    )
    theirs.save_pretrained(tmp_path / "4bit")
    assert f"{HEAD}.absmax" in load_file(tmp_path / "4bit/model.safetensors")
    tiny.save_tokenizer(tmp_path / "4bit")
    with built(OPTIONS | {"model_name": tmp_path / "4bit", "train_type": "qlora"}) as ours:
        head = ours.model.head.weight.decode(torch.float32).cpu()
    truth = plain.decoded(theirs.lm_head).view_as(head).float().cpu()
    torch.testing.assert_close(head, truth, rtol=0, atol=1e-6)
    assert not torch.equal(head, load_file(tmp_path / "model/model.safetensors")[HEAD])


# --- files


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin_is_as_good(zipped, tied, tmp_path):
    pickled(llama(tmp_path, tie_word_embeddings=tied), _use_new_zipfile_serialization=zipped)
    assert_reads_what_transformers_reads(tmp_path)
    with built(OPTIONS | {"model_name": tmp_path}) as ours:
        assert ours.model.is_tied() == tied


def test_pytorch_model_bin_in_several_files(tmp_path):
    tensors = load_file(llama(tmp_path) / "model.safetensors")
    names, files = sorted(tensors), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for number, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[number::2]}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    assert_reads_what_transformers_reads(tmp_path)


def test_safetensors_go_before_pickles(tmp_path):
    llama(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_reads_what_transformers_reads(tmp_path)


class Surprise:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.file,)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "objects in a pickle": (
        lambda f: torch.save({"a": torch.ones(1), "b": Surprise(f.parent / "ran")}, f / "pytorch_model.bin"),
        "holds Python objects beside tensors",
    ),
    "no table": (lambda f: torch.save([torch.ones(1)], f / "pytorch_model.bin"), "is no table of tensors by name"),
    "a pickle cut short": (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\3\4 cut"), "cannot be read"),
    "nothing": (lambda f: None, "holds none of model.safetensors"),
    "another form": (lambda f: (f / "model.fp16.safetensors").write_bytes(b""), "only model.fp16.safetensors"),
    "a file outside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
        "names files outside its folder (../model.safetensors)",
    ),
    "a file at the root": (
        lambda f: (f / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "/etc/passwd"}}'),
        "names files outside its folder (/etc/passwd)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_files_that_are_not_read_say_why(kind, tmp_path, capsys):
    damage, why = DAMAGE[kind]
    folder = llama(tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path)  # where an index may point to
    (folder / "model.safetensors").unlink()
    damage(folder)
    assert why in refused(folder, capsys)
    assert not (tmp_path / "ran").exists()


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_recognised(file, tmp_path, capsys):
    (llama(tmp_path / "model") / file).write_text(POINTER)
    line = refused(tmp_path / "model", capsys, dataset=tiny.save_rows(tmp_path / "rows.jsonl", 4))
    assert f"{file} in {tmp_path / 'model'} is a git-lfs pointer" in line
    assert "git lfs pull" in line


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_is_recognised(beside_a_model, tmp_path, capsys):
    folder = tmp_path / "adapter"
    if beside_a_model:
        llama(folder)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base"}')
    line = refused(folder, capsys)
    assert "holds an adapter (adapter_config.json)" in line
    assert ("beside a model" if beside_a_model else "set model_name to its base (somebody/base)") in line


def test_code_of_a_checkpoint_is_never_run_nor_asked_about(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "needs Python code of its own (auto_map in its config.json)" in refused(folder, capsys)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_family_that_transformers_knows_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = llama(tmp_path / "model")
    for file, classes in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Slow", "own.Fast"]}),
    ):
        settings = json.loads((folder / file).read_text()) | {"auto_map": classes}
        (folder / file).write_text(json.dumps(settings))
    rows = tiny.save_rows(tmp_path / "rows.jsonl", 4)
    options = {"model_name": folder, "dataset": rows, "max_steps": 1, "output_dir": tmp_path / "out"}
    assert train.main(flags(OPTIONS | options)) == 0


# --- what the config says

SCALED = {
    "none": ({}, 256),
    "yarn that states the original": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        1024,
    ),
    "yarn that states the scaled": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "yarn without an original": ({"rope_type": "yarn", "factor": 2.5}, 640),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 512),
    "linear": ({"rope_type": "linear", "factor": 3.0}, 768),
    "old names": ({"type": "linear", "factor": 3.0}, 768),
}


@pytest.mark.parametrize("kind", SCALED)
def test_contexts_up_to_the_scaled_length_are_accepted(kind, tmp_path):
    scaling, longest = SCALED[kind]
    llama(tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_scaling": scaling, "rope_theta": rope["rope_theta"]} if scaling else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert max_positions(read_config(str(tmp_path), None)) == longest


def test_a_context_beyond_the_stated_length_trains_where_positions_are_scaled(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    llama(tmp_path / "model", max_position_embeddings=64, rope_parameters=yarn)
    options = {"model_name": tmp_path / "model", "output_dir": tmp_path / "out", "dataset_samples": 2, "max_steps": 1}
    assert train.main(flags(OPTIONS | options | {"context_length": 256})) == 0


def test_positions_of_each_kind_of_layer_are_looked_at(tmp_path):
    kinds = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    config = transformers.Gemma3TextConfig(**tiny.SHAPE | {"rope_parameters": kinds})
    assert max_positions(config) == 8 * 256


NOT_CAUSAL = {
    "Bert": ({}, "its attention looks both ways"),
    "CpmAnt": ({}, "its attention looks at later tokens too"),
    "PaliGemma": (None, "it wraps a text model"),
}


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_what_cannot_be_trained_is_named_before_anything_is_read(family, tmp_path, capsys):
    more, why = NOT_CAUSAL[family]
    config = getattr(transformers, f"{family}Config")(**({} if more is None else tiny.SHAPE | more))
    config.save_pretrained(tmp_path / "model")
    line = refused(tmp_path / "model", capsys)
    assert why in line
    assert f"is a {config.model_type} model" in line


def test_two_dimensional_norms_are_read(tmp_path):
    config = transformers.CohereConfig(**tiny.SHAPE | TIED | {"use_qk_norm": True})
    tiny.save_model(config, tmp_path)
    rewrite(tmp_path, lambda tensors: [t.add_(torch.randn_like(t)) for n, t in tensors.items() if "_norm" in n])
    assert load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.q_norm.weight"].ndim == 2
    assert_trains_as_peft(tmp_path, "lora")


# --- the pad token


@pytest.mark.parametrize("pad", ["added", "none"])
def test_a_pad_token_outside_the_embedding_changes_nothing(pad, tmp_path):
    """Padding is masked by its position: a run with any id there learns the same."""
    folder = llama(tmp_path / "model", vocab_size=259)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = tiny.save_rows(tmp_path / "rows.jsonl", 6)
    options = OPTIONS | {"dataset": rows, "batch_size": 3, "lr": 1e-2, "save_model": False}
    assert train.main(flags(options | {"model_name": folder, "output_dir": tmp_path / "before"})) == 0
    if pad == "added":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == 259
    else:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert train.main(flags(options | {"model_name": folder, "output_dir": tmp_path / "after"})) == 0
    before, after = ((tmp_path / run / "metrics.jsonl").read_text() for run in ("before", "after"))
    losses = re.compile(r'"loss": [0-9.e-]+')
    assert losses.findall(before) == losses.findall(after) != []
