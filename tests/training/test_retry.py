"""A step that runs out of GPU memory is begun again with less saved for backward: the same bits, and said once."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from tests.support import tiny
from tests.support.runs import Options, Run, flags
from tests.support.torchrun import ROOT, run_torchrun

STEPS, BLOCKS, MICRO = 3, 3, 2
PASSES = BLOCKS * MICRO  # of blocks in a step, forward or backward
BASE: Options = {
    "precision": "fp32",
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "lr": 1e-2,
    "lr_scheduler": "constant",
    "context_length": 64,
    "batch_size": 2,
    "gradient_accumulation_steps": MICRO,
    "max_steps": STEPS,
    "num_epochs": 9,
}
REPLICATED: Options = {"sharding_strategy": "ddp", "optimizer": "fused_adamw"}  # its updates are queued ahead
STREAMED: Options = {"use_cpu_offload": True, "resident_blocks": 0, "optimizer": "sgd", "no_sync": True}
CONFIGS = {
    "replicated": (REPLICATED, False),
    "replicated, sgd": (REPLICATED | {"optimizer": "sgd"}, False),
    "streamed": (STREAMED, True),
    "streamed, ahead": (STREAMED | {"optimizer": "fused_adamw", "no_sync": False}, True),
    "streamed, on the GPU": (STREAMED | {"no_sync": False, "resident_blocks": 1}, False),
    "two resident": (STREAMED | {"optimizer": "fused_adamw", "resident_blocks": 2}, False),
    "FSDP2 alone": ({"use_cpu_offload": True, "cpu_offload_by": "fsdp2", "optimizer": "fused_adamw"}, False),
}


@dataclass(frozen=True)
class Case:
    """config: of `CONFIGS`. faults: (rank, place, call) as `ranks_that_run_out.py` has them; -1: the last rank.

    retries: of each step. shrinks: of the base as well, less stays on the device."""

    config: str
    faults: tuple[tuple[int, str, int], ...]
    retries: tuple[int, ...] = (0, 1, 0)
    shrinks: bool = False


def call(step: int, block: int, micro: int = 0) -> int:
    """The number of a block's forward, steps counted from 0."""
    return step * PASSES + micro * BLOCKS + block + 1


def back(step: int, block: int, micro: int = 0) -> int:
    """The number of a block's backward."""
    return step * PASSES + micro * BLOCKS + BLOCKS - block


LAST = -1
CASES = {
    "forward": Case("replicated", ((LAST, "forward", call(1, 1)),)),
    "forward, first block": Case("streamed", ((LAST, "forward", call(1, 0)),)),
    "first step": Case("streamed, ahead", ((LAST, "forward", call(0, 1)),), (1, 0, 0)),
    "last step": Case("replicated, sgd", ((LAST, "backward", back(2, 1, 1)),), (0, 0, 1)),
    "backward": Case("replicated", ((LAST, "backward", back(1, 1)),)),
    "backward, streamed": Case("streamed", ((LAST, "backward", back(1, 1)),)),
    "backward, last micro-batch": Case("streamed", ((LAST, "backward's end", back(1, 2, 1)),)),
    "backward, first block": Case("streamed, ahead", ((LAST, "backward's end", back(1, 0, 1)),)),
    "head": Case("streamed, on the GPU", ((LAST, "head", MICRO + 1),)),
    "head, last micro-batch": Case("replicated", ((LAST, "head", MICRO + 2),)),
    "offloading": Case("streamed, ahead", ((LAST, "offloading", call(1, 1, 1)),)),
    "restoring": Case("streamed", ((LAST, "restoring", back(1, 1)),)),
    "gradients": Case("streamed, ahead", ((LAST, "gradients", back(1, 1, 1)),)),
    "own sum": Case("streamed", ((LAST, "gradients", back(1, 1, 0)),)),
    "reduced gradients": Case("streamed, on the GPU", ((LAST, "reduced gradients", back(1, 1, 1)),)),
    "sums": Case("replicated", ((LAST, "sums", 2),)),
    "cuBLAS": Case("replicated", ((LAST, "cuBLAS", call(1, 0)),)),
    "two ranks": Case("streamed, ahead", ((0, "backward", back(1, 1)), (LAST, "forward", call(1, 2, 1)))),
    "twice in a row": Case("replicated", ((LAST, "forward", call(1, 1)), (LAST, "forward", call(1, 1) + 2)), (0, 2, 0)),
    "blocks leave": Case("two resident", ((LAST, "backward", back(1, 1)),), shrinks=True),
    "blocks leave before they are read": Case("two resident", ((LAST, "forward", 1),), (1, 0, 0), shrinks=True),
    "FSDP2, forward": Case("FSDP2 alone", ((0, "forward", call(1, 1)),)),
    "FSDP2, backward": Case("FSDP2 alone", ((0, "backward", back(1, 1)),)),
    "in two steps": Case("streamed", ((0, "backward", back(0, 2)), (LAST, "head", 3 * MICRO + 1)), (1, 0, 1)),
}
OF_ONE = ["FSDP2, forward", "FSDP2, backward"]  # over several ranks it gathers in the passes
CHOSEN = {
    1: ["forward", "backward, streamed", "own sum", "head", "restoring", "twice in a row", "blocks leave", *OF_ONE],
    2: [name for name in CASES if name not in OF_ONE],
    4: ["forward", "backward, last micro-batch", "offloading", "two ranks", "blocks leave"],
}
STAYS: Options = REPLICATED | {"use_activation_cpu_offload": False}  # on a GPU host memory could take something else
REFUSED: dict[str, tuple[Options, str, tuple[int, str, int], str]] = {
    "kept as asked": (STAYS | {"keep_activations": "qkv"}, "", (LAST, "forward", call(1, 1)), "saved in"),
    "least already": (STAYS, "leanest", (LAST, "backward", back(1, 1)), "saved in"),
    "first step": (STAYS, "leanest", (LAST, "backward", back(0, 1)), "context_length"),
    "generic": (REPLICATED | {"fused": "false"}, "", (LAST, "head", MICRO + 1), "saved in"),
    # At the end of the launch: the others learn of it when the rank's process ends.
    "sharded": (
        {"sharding_strategy": "full_shard", "use_activation_cpu_offload": False, "keep_activations": "qkv"},
        "",
        (LAST, "head", MICRO + 1),
        "",
    ),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("retry")
    tiny.save_model(LlamaConfig(**tiny.SHAPE), root / "model")
    tiny.save_rows(root / "rows.jsonl", 64)
    return root


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    out: list[str]
    err: list[str]
    run: Run

    @property
    def everything(self) -> str:
        return "\n".join([str(self.codes), *self.out, *self.err])


def _launch(material: Path, folder: Path, cases: dict[str, dict], ranks: int) -> dict[str, Ended]:
    folder.mkdir()
    for name, case in cases.items():
        given = BASE | {"model_name": material / "model", "dataset": material / "rows.jsonl"}
        case["arguments"] = flags(given | case.pop("options") | {"output_dir": folder / name})
        case["faults"] = [(rank % ranks, place, number) for rank, place, number in case["faults"]]
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(folder / "cases.json"), str(folder)]
    done = run_torchrun(ROOT / "tests/support/ranks_that_run_out.py", ranks, arguments, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    of = {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(ranks)] for name in cases}
    return {
        name: Ended([r["code"] for r in all_], [r["out"] for r in all_], [r["err"] for r in all_], Run(folder / name))
        for name, all_ in of.items()
    }


def _case(options: Options, keep: str, offloaded: bool, faults: object = ()) -> dict:
    return {"options": options, "keep": keep, "offloaded": offloaded, "faults": faults, "shrinks": False}


@dataclass(frozen=True)
class Launched:
    ended: dict[str, Ended]  # by case of `CASES`
    without: dict[str, Ended]  # by config: with no fault


@pytest.fixture(scope="module")
def launch(material, tmp_path_factory) -> Callable[[int], Launched]:
    """All chosen cases of a number of ranks, in one launch of their own the first time."""

    @cache
    def launched(ranks: int) -> Launched:
        chosen = {name: CASES[name] for name in CHOSEN[ranks]}
        used = {case.config for case in chosen.values()}
        cases = {f"no fault, {name}": _case(CONFIGS[name][0], "all", CONFIGS[name][1]) for name in used}
        for name, case in chosen.items():
            options, offloaded = CONFIGS[case.config]
            cases[name] = _case(options, "all", offloaded, case.faults) | {"shrinks": case.shrinks}
        ended = _launch(material, tmp_path_factory.mktemp("ranks") / "all", cases, ranks)
        return Launched({name: ended[name] for name in chosen}, {name: ended[f"no fault, {name}"] for name in used})

    return launched


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in CHOSEN.items() for name in names])
def test_a_step_that_runs_out_of_memory_is_repeated_to_the_bit(ranks, name, launch):
    told = CASES[name]
    if sum(told.retries) > 1 and torch.cuda.is_available():
        pytest.skip("as often as a plan has something to give")
    case, without = launch(ranks).ended[name], launch(ranks).without
    assert case.codes == [0] * ranks, case.everything
    clean = without[told.config]
    assert clean.codes == [0] * ranks, clean.everything
    assert case.out[0].count("trying again with less saved for backward") == sum(told.retries), case.everything
    assert not any("trying again" in text for text in case.out[1:])
    assert not "".join(case.err).strip(), case.everything
    assert tuple(record["step_retries"] for record in case.run.records) == told.retries
    assert [record["step"] for record in case.run.records] == [1, 2, 3]
    assert [record["tokens"] for record in case.run.records] == [record["tokens"] for record in clean.run.records]
    plans = [json.loads((run.folder / "plan.json").read_text())["plan"] for run in (case.run, clean.run)]
    (now, before) = ([(block["keep"], block["offloaded"]) for block in plan["blocks"]] for plan in plans)
    assert now != before
    residents = [[block["resident"] for block in plan["blocks"]] for plan in plans]
    assert residents[0] == ([False, False, True] if told.shrinks else residents[1])
    if told.shrinks:
        assert sum(residents[1]) == 2
        assert "; 1 block and the head moved to host memory; 2 buffers" in case.out[0]
    saved, expected = case.run.tensors, clean.run.tensors
    assert saved.keys() == expected.keys()
    if torch.cuda.is_available():  # whose attention adds gradients in any order
        assert case.run.losses == pytest.approx(clean.run.losses, rel=1e-4)
        return
    assert case.run.losses == clean.run.losses
    assert [r["grad_norm"] for r in case.run.records] == [r["grad_norm"] for r in clean.run.records]
    assert [r["lr"] for r in case.run.records] == [r["lr"] for r in clean.run.records]
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    assert len(set(clean.run.losses)) == STEPS, "nothing was learnt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there attention adds gradients in any order")
@pytest.mark.parametrize("ranks", [2, 4])
def test_placement_and_what_blocks_keep_change_no_bit_beside_each_other(ranks, launch):
    """Over micro-batches, whose tensors have the same places: none may be taken while it is still on its way."""
    alike = [launch(ranks).without[name].run for name in ("replicated", "streamed, ahead")]
    assert alike[0].losses == alike[1].losses
    assert [r["grad_norm"] for r in alike[0].records] == [r["grad_norm"] for r in alike[1].records]


@pytest.mark.parametrize("ranks", CHOSEN)
def test_the_line_says_who_why_and_what_is_kept_now(ranks, launch):
    ended = launch(ranks).ended
    told = re.findall(r"^step 2: GPU memory ran out on .*", ended["forward"].out[0], re.MULTILINE)
    assert len(told) == 1
    assert told[0].startswith(f"step 2: GPU memory ran out on rank {ranks - 1} (CUDA out of memory. Tried to allocate ")
    assert re.search(r"; trying again with less saved for backward: \d blocks \w+ \((GPU |host )?memory\)", told[0])
    if ranks > 1:
        assert f"on ranks 0, {ranks - 1} (" in ended["two ranks"].out[0]


@pytest.fixture(scope="module", params=[1, 2])
def refused(request, material, tmp_path_factory) -> tuple[int, dict[str, Ended]]:
    cases = {name: _case(options, keep, False, [fault]) for name, (options, keep, fault, _) in REFUSED.items()}
    return request.param, _launch(material, tmp_path_factory.mktemp("ranks") / "refused", cases, request.param)


@pytest.mark.parametrize("name", REFUSED)
def test_where_nothing_is_left_to_give_all_ranks_stop_with_one_line(name, refused):
    ranks, ended = refused
    case, words = ended[name], REFUSED[name][3]
    assert case.codes == [1] * ranks, case.everything
    lines = [line for text in case.err for line in text.splitlines() if line.strip()]
    if name == "sharded" and ranks > 1:  # the others end because this one has
        lines = [line for line in lines if "stopped because another rank ended" not in line]
    assert len(lines) == 1, case.everything
    step = 1 if name == "first step" else 2
    assert f"rank {ranks - 1}: GPU memory ran out in step {step} (CUDA out of memory. Tried to allocate" in lines[0]
    assert "--gpu_memory_gib 1 or 2 below what the card has" in lines[0]
    assert words in lines[0]
    assert "trying again" not in case.everything
    assert "Traceback" not in case.everything
    assert (case.run.folder / "adapter_model.safetensors").exists() == (step > 1)
    if step > 1:
        assert "as of step 1 is saved" in lines[0] or name == "sharded"
        assert any(tensor.any() for tensor in load_file(case.run.folder / "adapter_model.safetensors").values())
