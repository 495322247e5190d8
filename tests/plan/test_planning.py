"""What options mean to the plan, what this machine offers it, and `--plan_only` as a user types it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from transformers import LlamaConfig

import train
from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.config.parse import parse
from fsdp_qlora.distributed.world import open_world
from fsdp_qlora.errors import UserError
from fsdp_qlora.plan import budget, planning
from fsdp_qlora.plan.budget import DEVICE_STEP, HOST_STEP, find_budget
from fsdp_qlora.plan.plan import Budget
from fsdp_qlora.plan.planning import Planned, agreed, micro_batches, wishes_of
from fsdp_qlora.units import GIB
from fsdp_qlora.weights import hub as weights
from fsdp_qlora.weights.codecs import is_quantized
from tests.support import tiny
from tests.support.known_runs import facts
from tests.support.runs import run_alone
from tests.support.torchrun import ROOT, run_torchrun

ANYWHERE = ("replicate", "shard", "stream")


@pytest.mark.parametrize(
    ("given", "ranks", "placements"),
    [
        ("", 2, ANYWHERE),
        ("", 1, ("replicate", "stream")),
        ("--use_cpu_offload true", 2, ("stream",)),
        ("--use_cpu_offload true", 1, ("stream",)),
        ("--use_cpu_offload true --sharding_strategy full_shard", 2, ("stream",)),
        ("--use_cpu_offload true --cpu_offload_by fsdp2", 2, ("shard_offload",)),
        ("--use_cpu_offload true --cpu_offload_by fsdp2 --sharding_strategy shard_grad_op", 2, ("shard_offload",)),
        ("--use_cpu_offload false", 2, ("replicate", "shard")),
        ("--use_cpu_offload false", 1, ("replicate",)),
        ("--sharding_strategy full_shard", 2, ("shard",)),
        ("--sharding_strategy hybrid_shard_grad_op", 2, ("shard",)),
        ("--sharding_strategy full_shard", 1, ("replicate",)),
        ("--sharding_strategy ddp", 2, ("replicate",)),
    ],
)
def test_where_the_base_may_lie(given, ranks, placements):
    memory = parse(["--model_name", "m", *given.split()]).memory
    assert wishes_of(memory, ranks).placements == placements


def test_what_blocks_keep_is_the_plans_unless_it_is_given():
    assert wishes_of(MemoryOptions(), 1).keep is None
    assert wishes_of(MemoryOptions(keep_activations="qkv"), 1).keep == "qkv"
    assert wishes_of(MemoryOptions(use_gradient_checkpointing=False), 1).keep == "all"
    assert [wishes_of(MemoryOptions(use_activation_cpu_offload=x), 1).offload for x in (None, True, False)] == [
        None,
        True,
        False,
    ]


def test_a_limit_that_is_given_is_the_limit_on_a_gpu_and_no_option_without_one():
    config = parse(["--model_name", "m", "--host_memory_gib", "3.5"])
    with open_world(config.launch, 0) as world:
        found = find_budget(MemoryOptions(), world)
        if torch.cuda.is_available():
            assert find_budget(config.memory, world).host_bytes == 3.5 * GIB
        else:
            with pytest.raises(UserError, match=r"host_memory_gib: 3\.5 has no effect without a GPU"):
                find_budget(config.memory, world)
    assert 0 < found.host_bytes < psutil.virtual_memory().total
    assert found.device_bytes > 0
    assert math.isinf(found.device_bytes) != torch.cuda.is_available()


def test_a_limit_beyond_what_there_can_be_is_refused(monkeypatch):
    monkeypatch.setattr(budget, "total_host_bytes", lambda: 64 * GIB)
    budget.check_host_limit(None)
    budget.check_host_limit(64.0)
    with pytest.raises(UserError, match=r"^host_memory_gib: 64\.5 is more than the 64\.0 GiB that this machine"):
        budget.check_host_limit(64.5)


def test_a_little_more_or_less_that_is_free_is_the_same_budget(monkeypatch):
    """So that the next start finds what this one has searched for; never more than there is."""
    free = {"host": 0.0, "device": 0.0}
    monkeypatch.setattr(budget, "available_host_bytes", lambda: free["host"] / budget.HOST_SHARE)
    monkeypatch.setattr(budget, "device_bytes", lambda memory, world: free["device"])
    found = set()
    with open_world(parse(["--model_name", "m"]).launch, 0) as world:
        for more in (1, 100_000, DEVICE_STEP - 1):
            free["host"], free["device"] = 100 * HOST_STEP + more, 1000 * DEVICE_STEP + more
            found.add(find_budget(MemoryOptions(), world))
        assert found == {Budget(1000 * DEVICE_STEP, 100 * HOST_STEP)}
        free["device"] += 1
        assert find_budget(MemoryOptions(), world) == Budget(1001 * DEVICE_STEP, 100 * HOST_STEP)
        free["device"] = math.inf
        assert math.isinf(find_budget(MemoryOptions(), world).device_bytes)


def test_ranks_with_different_cards_plan_for_the_one_that_needs_most(monkeypatch):
    @dataclass(frozen=True)
    class Known:
        workspace_bytes: int
        local_ranks: int
        attention: str
        exchange_by_host: bool
        multiprocessors: int

    theirs = [32.0, 2.0, planning.ATTENTION.index("math"), 1.0, 128.0]
    with open_world(parse(["--model_name", "m"]).launch, 0) as world:
        monkeypatch.setattr(type(world), "gather", lambda self, numbers: [list(map(float, numbers)), theirs])
        assert agreed(Known(8, 4, "flash", True, 82), world) == Known(32, 4, "math", False, 128)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A config alone: there is no weight that could be read, nor a tokenizer."""
    folder = tmp_path_factory.mktemp("plan")
    LlamaConfig(**tiny.SHAPE).save_pretrained(folder)
    return folder


def test_plan_only_prints_the_plan_and_leaves_nothing(model, tmp_path):
    """Neither weights nor data are looked for, and no folder is made."""
    options = [
        "--model_name",
        str(model),
        "--dummy_weights",
        "true",
        "--dataset",
        str(tmp_path / "none.jsonl"),
        "--context_length",
        "128",
    ]
    arguments = [*options, "--plan_only", "true", "--output_dir", str(tmp_path / "out")]
    done = run_torchrun(ROOT / "train.py", 2, [*arguments, "--use_cpu_offload", "true"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plan      stream: ") == 1, done.stdout
    # As many stay on a GPU as have room there, here all but the one that makes it a stream; without a GPU none does.
    assert f"{2 if torch.cuda.is_available() else 0} of 3 blocks resident" in done.stdout
    assert "memory " in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_refused_option_is_still_refused(model, capsys):
    assert (
        train.main(["--model_name", str(model), "--plan_only", "--sharding_strategy", "ddp", "--use_cpu_offload"]) == 2
    )
    assert "ddp keeps the whole model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_leaves_its_plan_beside_what_came(tmp_path):
    tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path / "model")
    rows = tiny.save_rows(tmp_path / "rows.jsonl", 4)
    options = {"model_name": tmp_path / "model", "dataset": rows, "precision": "fp32", "context_length": 64}
    run = run_alone(options | {"use_cpu_offload": True, "keep_activations": "qkv"}, tmp_path / "out")
    record = json.loads((run.folder / "plan.json").read_text())
    assert record["plan"]["placement"] == "stream"
    assert [block["keep"] for block in record["plan"]["blocks"]] == ["qkv"] * 3
    assert record["facts"]["layers"] == 3
    assert record["plan"]["device_bytes"] == sum(record["plan"]["parts"].values()) > 0


def test_the_names_in_a_hub_models_checkpoint_need_no_download(monkeypatch):
    """A quantized checkpoint's layout depends on them, so the plan does."""
    hub = SimpleNamespace(weight_map={"a.weight": "x.safetensors", "a.weight.absmax": "x.safetensors"})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, revision: hub)
    monkeypatch.setattr(weights, "fetch", lambda *_: pytest.fail("downloaded"))
    source = weights.OnHub("somebody/something-bnb-4bit", None)
    assert source.names() == hub.weight_map.keys()
    assert is_quantized("a.weight", source.names())
    assert not is_quantized("b.weight", source.names())


@pytest.mark.slow
def test_a_hub_that_does_not_tell_names_is_asked_for_the_files(monkeypatch, tmp_path):
    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    monkeypatch.setattr(weights, "fetch", lambda *_: tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path / "model"))
    assert "model.norm.weight" in weights.OnHub("somebody/something", None).names()


def test_micro_batches_of_every_size_that_divides_a_steps_rows():
    config = parse(["--model_name", "m", "--batch_size", "-1", "--gradient_accumulation_steps", "12"])
    sizes = [(c.training.batch_size, c.training.gradient_accumulation_steps) for c in micro_batches(config)]
    assert sizes == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
    given = parse(["--model_name", "m", "--batch_size", "2", "--gradient_accumulation_steps", "12"])
    assert micro_batches(given) == [given]


def test_the_fastest_micro_batch_that_fits_is_taken(monkeypatch):
    """Larger ones are faster here, until 8, which does not fit."""
    rows = object()

    def plan_of(known, *_):
        if known.batch == 8:
            raise UserError("does not fit")
        return SimpleNamespace(seconds=1 / known.batch, micro_batch=known.batch, accumulation=8 // known.batch)

    def facts_of(model, config, *_, lengths):
        assert lengths is rows
        return facts("llama2_70b", config.training.batch_size, 64, 8)

    monkeypatch.setattr(planning, "facts_of", facts_of)
    monkeypatch.setattr(planning, "agreed", lambda facts, world: facts)
    monkeypatch.setattr(planning, "calibrate", lambda *_: None)
    monkeypatch.setattr(planning, "make_plan", plan_of)
    monkeypatch.setattr(planning, "table", lambda *_: [])
    monkeypatch.setattr(planning, "plan_record", lambda *_: {})
    config = parse(["--model_name", "m", "--batch_size", "-1", "--gradient_accumulation_steps", "8"])
    with open_world(config.launch, 0) as world:
        planned = planning.plan_run(None, config, None, rows, world)
        assert (planned.plan.micro_batch, planned.plan.accumulation) == (4, 2)
        assert planned.config == config, "as it was given"
        monkeypatch.setattr(planning, "make_plan", lambda *_: plan_of(SimpleNamespace(batch=8)))
        with pytest.raises(UserError, match="does not fit"):
            planning.plan_run(None, config, None, rows, world)


def test_memory_that_answers_take_is_not_the_plans():
    """Of the budget alone: what a later plan for what is free then leaves is the same."""
    seen, unlimited = [], Budget(float("inf"), 9 << 30)  # type: ignore[arg-type]

    def plan(budget: Budget) -> Planned:
        seen.append(budget)
        return Planned(None, ["plan"], {}, None, None, None, budget, None)  # type: ignore[arg-type]

    planned = planning.leaving(1 << 30, Budget(4 << 30, 9 << 30), plan)
    assert seen == [Budget(3 << 30, 9 << 30)]
    assert planned.beside == 1 << 30
    assert planned.lines == ["plan", "eval_generate keeps 1.00 GiB of each GPU for answers"]
    assert planning.leaving(0, Budget(4 << 30, 9 << 30), plan).lines == ["plan"]
    assert planning.leaving(1 << 30, unlimited, plan).beside == 0
    assert seen[1:] == [Budget(4 << 30, 9 << 30), unlimited]

    def refuse(budget: Budget) -> Planned:
        raise UserError("gpu_memory_gib: too little")

    with pytest.raises(UserError, match=r"too little; eval_generate keeps 1\.00 GiB"):
        planning.leaving(1 << 30, Budget(4 << 30, 9 << 30), refuse)


@pytest.mark.slow
def test_a_planned_micro_batch_trains_as_one_that_is_given(tmp_path):
    tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path / "model")
    rows = tiny.save_rows(tmp_path / "rows.jsonl", 12)
    options = {
        "model_name": tmp_path / "model",
        "dataset": rows,
        "precision": "fp32",
        "context_length": 200,
        "lr": 5e-3,
    }
    planned = run_alone(options | {"batch_size": -1, "gradient_accumulation_steps": 4}, tmp_path / "planned")
    facts = json.loads((planned.folder / "plan.json").read_text())["facts"]
    chosen = {"batch_size": facts["batch"], "gradient_accumulation_steps": facts["accumulation"]}
    assert facts["batch"] * facts["accumulation"] == 4
    if not torch.cuda.is_available():  # nothing is timed, so the smallest, which takes the least memory
        assert facts["batch"] == 1
    assert facts["context"] < 100, "planned for the longest row there is, not for the longest there might be"
    given = run_alone(options | chosen, tmp_path / "given")
    assert planned.losses == given.losses
    assert len(planned.losses) == 3
    # The same rows in each step, however they are cut: sums in another order, so equal within float32's rounding.
    for number, size in enumerate((1, 4)):
        cut = {"batch_size": size, "gradient_accumulation_steps": 4 // size}
        other = run_alone(options | cut, tmp_path / str(number))
        assert other.losses == pytest.approx(planned.losses, rel=1e-5)
