"""The command generate: the answers of PEFT, alike however rows and base are divided; mistakes in one line."""

import gzip
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from fsdp_qlora.__main__ import main
from fsdp_qlora.generation.sampling import Sampling, pick
from tests.support import plain, tiny
from tests.support.runs import Options, flags, run_alone
from tests.support.saved_adapters import save_random_adapter
from tests.support.torchrun import run_torchrun

NEW = 8


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter over it in 4 bits and rows with answers."""
    folder = tmp_path_factory.mktemp("material")
    tiny.save_model(transformers.Qwen2Config(**tiny.SHAPE), folder / "base", torch.bfloat16)
    save_random_adapter(folder / "adapter", {"model_name": folder / "base", "precision": "fp32"})
    tiny.save_rows(folder / "rows.jsonl", 7)
    return folder


def generate(output: Path, code: int = 0, **options: object) -> list[dict]:
    assert main(["generate", *flags({"output_file": output, "max_new_tokens": NEW} | options)]) == code
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def by_peft(material: Path, adapted: bool) -> list[str]:
    """Greedy answers of transformers on PEFT over bitsandbytes' numbers, one row at a time."""
    model = plain.load_base(material / "base", plain.Recipe())
    if adapted:
        model = PeftModel.from_pretrained(model, material / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(material / "base")
    said = []
    for line in (material / "rows.jsonl").read_text().splitlines():
        asked = tokenizer(json.loads(line)["prompt"], return_tensors="pt")
        out = model.eval().generate(**asked, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        said.append(tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def test_answers_are_those_of_peft_with_the_adapter_and_without(material, tmp_path, capsys):
    rows = [json.loads(line) for line in (material / "rows.jsonl").read_text().splitlines()]
    shared: Options = {"dataset": material / "rows.jsonl", "batch_size": 3}
    on = generate(tmp_path / "on.jsonl", adapter=material / "adapter", **shared)
    said = capsys.readouterr().out
    off = generate(tmp_path / "off.jsonl", model_name=material / "base", precision="fp32", **shared)
    assert [line["answer"] for line in on] == by_peft(material, True)
    assert [line["answer"] for line in off] == by_peft(material, False)
    assert on != off
    assert [line["row"] for line in on] == list(range(len(rows)))
    assert [line["prompt"] for line in on] == [row["prompt"] for row in rows]
    assert [line["expected"] for line in on] == [row["completion"] for row in rows]
    assert all(line["ended"] == ("stop" if line["tokens"] < NEW else "length") for line in on)
    assert "3 rows at a time on each rank" in said
    assert "tokens/s" in said


def test_the_base_that_a_run_has_kept_answers(material, tmp_path, capsys):
    shared: Options = {"model_name": material / "base", "precision": "fp32", "base_cache": tmp_path / "cache"}
    trained = {"dataset": material / "rows.jsonl", "max_steps": 1, "context_length": 48, "lora_rank": 2}
    run_alone(shared | trained, tmp_path / "out")
    capsys.readouterr()
    asked: Options = {"dataset": material / "rows.jsonl"}
    kept = generate(tmp_path / "kept.jsonl", **shared, **asked)
    assert f"6 of 6 units from {tmp_path / 'cache'}" in capsys.readouterr().out
    assert kept == generate(tmp_path / "none.jsonl", **(shared | {"base_cache": "null"}), **asked)


def test_a_file_of_lines_and_standard_output(material, tmp_path, capsys):
    file = tmp_path / "asked.txt"
    file.write_text("ant bee\n\ncow:\n")
    options = {"adapter": material / "adapter", "dataset": file, "output_file": "-", "max_new_tokens": NEW}
    assert main(["generate", *flags(options)]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in said.out.splitlines()] == ["ant bee", "cow:"]
    assert "tokens/s" in said.err


@pytest.mark.parametrize(("command", "output"), [("generate", "output_file"), ("evaluate", "output_dir")])
def test_plan_only_says_where_the_base_would_be_and_reads_no_weight(
    command, output, material, tmp_path, capsys, monkeypatch
):
    monkeypatch.delattr("fsdp_qlora.inference.load")
    options: Options = {"adapter": material / "adapter", "dataset": material / "rows.jsonl", "max_new_tokens": NEW}
    capsys.readouterr()
    assert main([command, *flags(options | {output: tmp_path / "out", "plan_only": True})]) == 0
    said = capsys.readouterr().out
    assert "base: replicate" in said
    assert "loaded" not in said
    assert not (tmp_path / "out").exists()


def test_lines_are_json_in_any_encoding_of_standard_output(material, tmp_path, monkeypatch):
    file = tmp_path / "asked.txt"
    file.write_text("ant é \N{OWL}\n", encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    options = {"adapter": material / "adapter", "dataset": file, "output_file": "-", "max_new_tokens": 1}
    assert main(["generate", *flags(options)]) == 0
    out.flush()
    line = out.buffer.getvalue()  # type: ignore[attr-defined]
    assert json.loads(line)["prompt"] == "ant é \N{OWL}"


def test_a_file_is_lines_of_text_by_its_last_suffix(material, tmp_path):
    rows = (material / "rows.jsonl").read_bytes()
    shared: Options = {"adapter": material / "adapter", "max_new_tokens": 1}
    (tmp_path / "rows.txt.jsonl").write_bytes(rows)
    assert len(generate(tmp_path / "rows", dataset=tmp_path / "rows.txt.jsonl", **shared)) == len(rows.splitlines())
    with gzip.open(tmp_path / "lines.txt.gz", "wb") as file:
        file.write(b"ant\nb\xe9e\ncow\n")
    found = generate(tmp_path / "lines", dataset=tmp_path / "lines.txt.gz", bad_rows="skip", **shared)
    assert [line["prompt"] for line in found] == ["ant", "cow"]


def test_a_row_keeps_its_number_and_its_draws_where_one_before_it_is_left_out(material, tmp_path):
    good, bad = {"prompt": "ant bee", "completion": "cow"}, {"prompt": "", "completion": "cow"}
    drawn: Options = {"adapter": material / "adapter", "temperature": 5, "bad_rows": "skip"}
    found = []
    for name, first in (("whole", good), ("holed", bad)):
        (tmp_path / name).with_suffix(".jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(good)}\n")
        found.append(generate(tmp_path / f"of-{name}", dataset=tmp_path / f"{name}.jsonl", **drawn))
    assert [line["row"] for line in found[0]] == [0, 1]
    assert found[0][0]["answer"] != found[0][1]["answer"]
    assert found[1] == found[0][1:]


CASES: dict[str, Options] = {
    "replicate": {"sharding_strategy": "ddp"},
    "shard": {"sharding_strategy": "full_shard", "batch_size": 2},
    "stream": {"use_cpu_offload": "true", "batch_size": 3},
    "some-resident": {"use_cpu_offload": "true", "resident_blocks": 2},
    "fsdp2-offload": {"use_cpu_offload": "true", "cpu_offload_by": "fsdp2"},
    "generic-shard": {"sharding_strategy": "full_shard", "fused": "false", "batch_size": 2},
}
WORKER = """
    import json, sys
    from tests.support.meeting import meet_at
    from fsdp_qlora.__main__ import main

    for name, arguments in json.load(open(sys.argv[1])).items():
        meet_at(name)
        sys.stdout.write(f"{name} ended with {main(arguments)}\\n")
    """


def test_two_ranks_answer_as_one_wherever_the_base_is(material, tmp_path):
    shared: Options = {"adapter": material / "adapter", "dataset": material / "rows.jsonl", "max_new_tokens": NEW}
    wanted, runs = {}, {}
    for name, more in (("greedy", {}), ("drawn", {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 3})):
        wanted[name] = generate(tmp_path / f"{name}.jsonl", **shared | more)
        for case, placed in CASES.items():
            if name == "drawn" and case not in ("replicate", "shard"):
                continue
            output = tmp_path / f"{name}-{case}.jsonl"
            runs[f"{name}-{case}"] = ["generate", *flags(shared | more | placed | {"output_file": output})]
    (tmp_path / "cases.json").write_text(json.dumps(runs))
    done = run_torchrun(WORKER, 2, [str(tmp_path / "cases.json")], timeout=200)
    for case in runs:
        assert done.stdout.count(f"{case} ended with 0") == 2, done.stdout + done.stderr
        found = [json.loads(line) for line in (tmp_path / f"{case}.jsonl").read_text().splitlines()]
        assert found == wanted[case.partition("-")[0]], case
    assert wanted["greedy"] != wanted["drawn"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["adapter null", "model_name null", "nothing to ask"]),
        ({"adapter": "ADAPTER", "top_k": 3}, ["top_k 3", "no effect", "temperature above 0"]),
        ({"adapter": "ADAPTER", "max_new_tokens": 250}, ["max_new_tokens 250", "at most 256 tokens", "line"]),
        ({"adapter": "BASE"}, ["adapter:", "has no adapter_config.json"]),
        ({"adapter": "ADAPTER", "model_name": "OTHER"}, ["adapter:", "another base"]),
        ({"adapter": "ADAPTER", "output_file": "ROWS"}, ["output_file", "exists", "--overwrite true"]),
        ({"adapter": "ADAPTER", "output_file": "BESIDE"}, ["output_file", "cannot be written"]),
        ({"adapter": "ADAPTER", "output_file": "FOLDER", "overwrite": "true"}, ["output_file", "cannot be written"]),
        ({"adapter": "ADAPTER", "dataset": "LATIN"}, ["line 2 is not UTF-8 text", "byte 1 of the line"]),
        ({"adapter": "ADAPTER", "dataset": "dummy"}, ["dataset dummy", "ask nothing"]),
        ({"adapter": "ADAPTER", "sharding_strategy": "ddp", "use_cpu_offload": "true"}, ["nothing is offloaded"]),
        ({"adapter": "ADAPTER", "gpu_memory_gib": 4}, ["gpu_memory_gib", "no effect without a GPU"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(options, words, material, tmp_path, capsys):
    if torch.cuda.is_available() and "gpu_memory_gib" in options:
        pytest.skip("there is a GPU")
    places = {"ADAPTER": material / "adapter", "BASE": material / "base", "ROWS": material / "rows.jsonl"}
    places |= {"BESIDE": material / "rows.jsonl" / "a.jsonl", "FOLDER": tmp_path, "LATIN": tmp_path / "latin.txt"}
    places["LATIN"].write_bytes(b"ant\nb\xe9e\n")
    if options.get("model_name") == "OTHER":
        shape = tiny.SHAPE | {"hidden_size": 128}
        places["OTHER"] = tiny.save_model(transformers.Qwen2Config(**shape), tmp_path / "other")
    given = {"dataset": material / "rows.jsonl", "max_new_tokens": NEW, "output_file": tmp_path / "none.jsonl"}
    given |= {name: places.get(value, value) for name, value in options.items()}
    capsys.readouterr()
    assert main(["generate", *flags(given)]) == 2
    said = capsys.readouterr()
    assert "loaded" not in said.out
    lines = [line for line in said.err.splitlines() if line.startswith("generate:")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines
    assert not (tmp_path / "none.jsonl").exists()


# ---- sampling


def test_drawn_tokens_have_the_models_probabilities():
    logits = torch.randn(1, 12) * 2
    uniform = (torch.arange(20000) + 0.5) / 20000
    drawn = pick(logits.expand(20000, -1), uniform, Sampling(temperature=0.7))
    share = torch.bincount(drawn, minlength=12) / 20000
    torch.testing.assert_close(share, (logits[0] / 0.7).softmax(0), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (4, 0.6), (1, 1.0), (0, 1e-9)])
def test_filters_leave_what_transformers_leave(top_k, top_p):
    logits = torch.randn(5, 40) * 2
    theirs = [transformers.TemperatureLogitsWarper(1.5)]
    theirs += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    theirs += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits
    for one in theirs:
        scores = one(None, scores)
    uniform = torch.linspace(0, 1 - 1e-7, 500)
    for row in range(5):
        drawn = pick(logits[row].expand(500, -1), uniform, Sampling(1.5, top_k, top_p))
        allowed = scores[row].isfinite().nonzero()[:, 0].tolist()
        assert set(drawn.tolist()) <= set(allowed)
        likely = (scores[row].softmax(0) > 0.004).nonzero()[:, 0].tolist()
        assert set(likely) <= set(drawn.tolist())


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-6, 1e6, 1e38])
def test_any_temperature_draws_a_token(temperature):
    logits = torch.randn(1, 12) * 50
    drawn = pick(logits.expand(999, -1), torch.linspace(0, 1 - 1e-7, 999), Sampling(temperature))
    if temperature < 1:
        assert set(drawn.tolist()) == {int(logits.argmax())}
    else:
        assert set(drawn.tolist()) == set(range(12))


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_logits_that_are_no_numbers_draw_a_token_all_the_same(wild):
    logits = torch.zeros(1, 12)
    logits[0, 5] = wild
    assert 0 <= int(pick(logits, torch.tensor([0.5]), Sampling(1.0, top_p=0.9))) < 12


def test_a_rows_numbers_are_its_own():
    sampling = Sampling(1.0, seed=7)
    assert torch.equal(sampling.draw(3, 9), sampling.draw(3, 9))
    assert torch.equal(sampling.draw(3, 9)[:5], sampling.draw(3, 5))
    assert not torch.equal(sampling.draw(3, 9), sampling.draw(4, 9))
    assert not torch.equal(sampling.draw(3, 9), Sampling(1.0, seed=8).draw(3, 9))
