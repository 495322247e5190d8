"""Placements and the ways to a step: wherever the frozen bytes lie and however a step is cut up, the same training."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.support import tiny
from tests.support.built import built
from tests.support.runs import Run, run_alone, run_ranks
from tests.support.torchrun import run_torchrun

ROWS = 21  # by fours: the sixth step of an epoch has one row, so that one of two ranks has nothing to do
OPTIONS = {
    "num_epochs": 2,
    "max_steps": 8,
    "lora_rank": 8,
    "lr": 5e-3,
    "precision": "fp32",
    "context_length": 64,
    "fused": "false",
}

FSDP2_OFFLOAD = {"use_cpu_offload": True, "cpu_offload_by": "fsdp2"}
STREAMED = {"use_cpu_offload": True, "resident_blocks": 0}
# Four rows a step on two ranks, two each at once. The same arithmetic in the same order: equal to the last bit.
SAME_BITS = {
    "reentrant": {"reentrant_checkpointing": True},
    "keeps-all": {"use_gradient_checkpointing": False},
    "shard_grad_op": {"sharding_strategy": "shard_grad_op"},
    "shard_grad_op-keeps-all": {"sharding_strategy": "shard_grad_op", "use_gradient_checkpointing": False},
    "ddp": {"sharding_strategy": "ddp"},
    "ddp-reentrant": {"sharding_strategy": "ddp", "reentrant_checkpointing": True},
    "hybrid-of-ones": {"sharding_strategy": "hybrid_full_shard", "hybrid_shard_size": 1},
    "fsdp2-offload": FSDP2_OFFLOAD,
    "fsdp2-offload-reentrant": FSDP2_OFFLOAD | {"reentrant_checkpointing": True},
    "fsdp2-offload-shard_grad_op": FSDP2_OFFLOAD | {"sharding_strategy": "shard_grad_op"},
    "streamed": STREAMED,
    "streamed-reentrant": STREAMED | {"reentrant_checkpointing": True},
    "streamed-keeps-all": STREAMED | {"use_gradient_checkpointing": False},
    "streamed-one-resident": STREAMED | {"resident_blocks": 1},
    "streamed-two-resident": STREAMED | {"resident_blocks": 2, "sharding_strategy": "full_shard"},
}
ONE_BY_ONE = {"batch_size": 1, "gradient_accumulation_steps": 2}
# The same sums in another order: equal within float32's rounding.
SAME_SUMS = {
    "accumulated": ONE_BY_ONE,
    "accumulated-reentrant-fsdp2-offload": ONE_BY_ONE | FSDP2_OFFLOAD | {"reentrant_checkpointing": True},
    "accumulated-streamed": ONE_BY_ONE | STREAMED,
    "no_sync": ONE_BY_ONE | {"no_sync": True},
    "no_sync-ddp": ONE_BY_ONE | {"no_sync": True, "sharding_strategy": "ddp"},
    "no_sync-shard_grad_op-keeps-all": ONE_BY_ONE
    | {"no_sync": True, "sharding_strategy": "shard_grad_op", "use_gradient_checkpointing": False},
    "fused": {"fused": "true"},
    "fused-fsdp2-offload-no_sync": ONE_BY_ONE | FSDP2_OFFLOAD | {"fused": "true", "no_sync": True},
}
# The same of fused blocks, wherever their bytes and what they keep lie: equal to the last bit to "fused".
FUSED = {
    f"fused-{name}-{keep}": {"fused": "true", "keep_activations": keep} | placed
    for name, placed in {
        "sharded": {"sharding_strategy": "full_shard"},
        "ddp": {"sharding_strategy": "ddp"},
        "streamed": STREAMED,
        "streamed-one-resident": STREAMED | {"resident_blocks": 1},
        "streamed-kept-on-host": STREAMED | {"use_activation_cpu_offload": True},
    }.items()
    for keep in ("input", "attention", "all")
}
DROPOUT = {
    "dropout": {},
    "dropout-again": {},
    "dropout-reentrant": {"reentrant_checkpointing": True},
    "dropout-keeps-all": {"use_gradient_checkpointing": False},
    "dropout-offload-ddp": {"sharding_strategy": "ddp"},
}
ON_FOUR = {
    "hybrid_full_shard": {"sharding_strategy": "hybrid_full_shard", "hybrid_shard_size": 2},
    "hybrid_shard_grad_op": {"sharding_strategy": "hybrid_shard_grad_op", "hybrid_shard_size": 2},
    "hybrid-fsdp2-offload": FSDP2_OFFLOAD | {"sharding_strategy": "hybrid_full_shard", "hybrid_shard_size": 2},
    "streamed": STREAMED,
}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("placement")
    tiny.save_model(LlamaConfig(**tiny.SHAPE), folder / "model")
    return OPTIONS | {"model_name": folder / "model", "dataset": tiny.save_rows(folder / "rows.jsonl", ROWS)}


class Launches:
    """Runs on two ranks, by name, launched when they are asked for.

    On GPUs each of `tables` is a launch: a run takes seconds there, most of them NCCL's, and the first result shall not
    wait for all. Without, where a launch takes longer than most of its runs, all are one."""

    def __init__(self, tables: list[dict[str, dict]], folder: Path) -> None:
        self.tables, self.folder = tables, folder
        if not torch.cuda.is_available():
            self.tables = [{name: case for table in tables for name, case in table.items()}]
        self.ended: dict[int, dict[str, Run] | BaseException] = {}

    def __getitem__(self, name: str) -> Run:
        (number,) = (i for i, table in enumerate(self.tables) if name in table)
        if number not in self.ended:
            try:
                self.ended[number] = run_ranks(self.tables[number], 2, self.folder / str(number))
            except (Exception, pytest.skip.Exception) as error:  # the next who asks is told the same, at once
                self.ended[number] = error
        runs = self.ended[number]
        if isinstance(runs, BaseException):
            raise runs
        return runs[name]


@pytest.fixture(scope="module")
def two(options, tmp_path_factory) -> Launches:
    of_two = options | {"batch_size": 2}
    first: dict[str, dict] = {"sharded": {"sharding_strategy": "full_shard"}, "reduce-bf16": {"reduce_dtype": "bf16"}}
    dropout = {name: more | {"lora_dropout": 0.3} for name, more in DROPOUT.items()}
    tables = [
        {name: of_two | more for name, more in table.items()} for table in (first, SAME_BITS, SAME_SUMS, FUSED, dropout)
    ]
    tables.append({name: options | more for name, more in twins(options).items()})
    return Launches(tables, tmp_path_factory.mktemp("two"))


def twins(options: dict) -> dict[str, dict]:
    """Runs over rows that are all the same, so that two ranks differ in nothing but what they draw."""
    row = Path(options["dataset"]).read_text().splitlines()[0]
    rows = Path(options["dataset"]).with_name("twins.jsonl")
    rows.write_text(f"{row}\n" * 8)
    more = {"dataset": rows, "lora_dropout": 0.3, "num_epochs": 1, "max_steps": 4, "batch_size": 1}
    return {"twins": more, "twins-fused": more | {"fused": "true"}}


@pytest.fixture(scope="module")
def four(options, tmp_path_factory) -> dict[str, Run]:
    cases = {name: options | {"batch_size": 1} | more for name, more in ON_FOUR.items()}
    return run_ranks(cases, 4, tmp_path_factory.mktemp("four"))


def assert_same_bits(run: Run, other: Run) -> None:
    assert run.losses == other.losses
    assert [r["grad_norm"] for r in run.records] == [r["grad_norm"] for r in other.records]
    assert run.tensors.keys() == other.tensors.keys()
    for name, tensor in run.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


def assert_same_sums(run: Run, other: Run) -> None:
    assert run.losses == pytest.approx(other.losses, rel=1e-5)
    assert [r["grad_norm"] for r in run.records] == pytest.approx([r["grad_norm"] for r in other.records], rel=1e-4)
    assert run.tensors.keys() == other.tensors.keys()
    for name, tensor in run.tensors.items():  # Adam divides by the gradient's size: a few steps of lr 5e-3 enlarge ulps
        torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-3, atol=1e-4)


def test_one_process_trains_as_two_ranks_do(options, two, tmp_path):
    """And four micro-batches of one row as one of four, though the rows are of unequal lengths."""
    whole = run_alone(options | {"batch_size": 4}, tmp_path / "whole")
    assert len(whole.losses) == 8
    assert whole.losses[-1] < whole.losses[0] - 0.5
    assert_same_sums(two["sharded"], whole)
    pieces = run_alone(options | {"batch_size": 1, "gradient_accumulation_steps": 4}, tmp_path / "pieces")
    assert_same_sums(pieces, whole)


@pytest.mark.parametrize("case", SAME_BITS)
def test_placement_and_checkpointing_change_no_bit(case, two):
    assert_same_bits(two[case], two["sharded"])


@pytest.mark.parametrize("case", FUSED)
def test_placement_and_what_is_kept_change_no_bit_of_fused_blocks(case, two):
    assert_same_bits(two[case], two["fused"])


@pytest.mark.parametrize("case", SAME_SUMS)
def test_cutting_up_a_step_changes_only_rounding(case, two):
    assert_same_sums(two[case], two["sharded"])


@pytest.mark.parametrize("case", ON_FOUR)
def test_four_ranks_train_as_two_do(case, two, four):
    assert_same_sums(four[case], two["sharded"])


@pytest.mark.parametrize("case", DROPOUT)
def test_dropout_is_drawn_alike_however_a_block_is_recomputed(case, two):
    assert_same_bits(two[case], two["dropout"])
    assert two["dropout"].losses[0] == two["sharded"].losses[0]  # B is zero before the first update
    assert two["dropout"].losses[2] != pytest.approx(two["sharded"].losses[2], rel=1e-4)


@pytest.mark.parametrize("case", ["twins", "twins-fused"])
def test_ranks_do_not_drop_the_same(case, options, two, tmp_path):
    """If they did, two ranks with the same row would be one rank with it."""
    alone = run_alone(options | twins(options)[case], tmp_path / "alone")
    assert len(alone.losses) == len(two[case].losses) == 4
    assert two[case].losses[0] == pytest.approx(alone.losses[0], rel=1e-5)
    assert two[case].losses[2] != pytest.approx(alone.losses[2], rel=1e-4)


def test_gradients_reduced_in_bfloat16_are_close(two):
    assert two["reduce-bf16"].losses != two["sharded"].losses
    assert two["reduce-bf16"].losses == pytest.approx(two["sharded"].losses, rel=0.02)


BYTES = """
    import os
    import sys
    from dataclasses import replace
    import torch
    import torch.distributed as dist
    from fsdp_qlora.config.options import LaunchOptions
    from fsdp_qlora.weights.frozen_bytes import checksum
    from fsdp_qlora.placement.base import held_bytes
    from fsdp_qlora.distributed.world import open_world
    from tests.support.built import build_in

    torch.use_deterministic_algorithms(True, warn_only=True)
    PLACEMENTS = {
        "ddp": ({"sharding_strategy": "ddp"}, 1),
        "full_shard": ({"sharding_strategy": "full_shard"}, 2),
        "shard_grad_op": ({"sharding_strategy": "shard_grad_op"}, 2),
        "hybrid": ({"sharding_strategy": "hybrid_full_shard", "hybrid_shard_size": 1}, 1),
        "fsdp2-offload": ({"use_cpu_offload": True, "cpu_offload_by": "fsdp2"}, 2),
        "streamed": ({"use_cpu_offload": True, "resident_blocks": 1}, 0),
    }
    EVERY_PATTERN = torch.arange(2**16).to(torch.uint16).view(torch.uint8)

    def bytes_for(unit, number):
        # every pair of bytes there is, begun elsewhere in each unit, so that units cannot be mistaken for each other
        nbytes = unit.frozen.layout.nbytes
        return EVERY_PATTERN.roll(34 * number).repeat(-(-nbytes // 2**17))[:nbytes]

    def same(frozen, wanted):
        return torch.equal(frozen.flat.detach().view(torch.uint8).cpu(), wanted)

    before = set(os.listdir("/dev/shm"))
    with open_world(LaunchOptions(), 0) as world:
        for name, (more, shards) in PLACEMENTS.items():
            options = {"model_name": sys.argv[1], "dataset": "dummy", "train_type": "lora", "precision": "fp32",
                       "use_gradient_checkpointing": False, "fused": "false", "lora_rank": 2}
            def two_buffers(plan):  # and the head comes too: four units by turns in two buffers
                return replace(plan, staging=2, head_resident=False) if plan.placement == "stream" else plan

            ours = build_in(world, options | more, two_buffers)
            units = ours.model.units
            wanted = [bytes_for(unit, i) for i, unit in enumerate(units)]
            if name == "streamed":
                ours.placement.prepare(ours.model)
            for unit, whole in zip(units, wanted, strict=True):
                unit.frozen.expected = checksum(whole)
                ours.placement.store(unit, whole.clone().to(world.device))
            ours.placement.finish()

            seen = []
            for i, block in enumerate(ours.model.blocks.values()):
                whole = wanted[1 + i]
                def on_entry(layer, args, block=block, whole=whole):
                    seen.append(same(block.frozen, whole))
                def on_output(linear, args, out, block=block, whole=whole):
                    out.register_hook(lambda gradient: seen.append(same(block.frozen, whole)))
                block.layer.register_forward_pre_hook(on_entry)
                block.layer.self_attn.q_proj.register_forward_hook(on_output)
            ids = torch.randint(0, 1024, (1, 8))
            ours.adapters.begin_micro_batch(last=True)
            loss = ours.loss(ids, ids, 7.0)
            whole_now = [not hasattr(block.frozen.flat, "to_local") for block in ours.model.blocks.values()]
            everywhere = name in ("ddp", "shard_grad_op", "streamed")
            assert whole_now == [everywhere] * 3, (name, whole_now)  # between the two passes
            loss.backward()
            ours.adapters.finish()
            assert seen == [True] * 2 * len(ours.model.blocks), (name, seen)  # each forward, and again in each backward
            for frozen, whole in ((ours.model.embedding[0].frozen, wanted[0]), (ours.model.head.frozen, wanted[-2])):
                with frozen.opened():
                    assert same(frozen, whole), name

            if name == "streamed":
                assert not os.listdir("/dev/shm") or before == set(os.listdir("/dev/shm")), "something has a name there"
                sys.stdout.write(f"rank {world.rank}: {name} keeps its bytes\\n")
                continue
            held = torch.tensor([held_bytes(unit) for unit in units])
            sharded = torch.tensor([unit.home == "shared" for unit in units])
            nbytes = torch.tensor([unit.frozen.layout.nbytes for unit in units])
            # on a GPU not the embedding, whose rows are read from host memory
            assert sharded.tolist() == [world.device.type == "cpu"] + [True] * 4 + [False]
            assert torch.equal(held, torch.where(sharded, nbytes // shards, nbytes)), (name, held, nbytes)
            for unit, whole in zip(units, wanted, strict=True):  # and each rank still has its own part of them
                flat = unit.frozen.flat
                mine = (flat.to_local() if hasattr(flat, "to_local") else flat).detach().view(torch.uint8)
                pieces = whole.view(shards, -1) if unit.home == "shared" else whole[None]
                assert torch.equal(mine.cpu(), pieces[world.rank % len(pieces)]), (name, unit.name)
            sys.stdout.write(f"rank {world.rank}: {name} keeps its bytes\\n")
    """


def test_all_bit_patterns_survive_every_placement(tmp_path):
    """Placed, gathered for a forward and for a backward, freed, offloaded: NaNs' payloads and denormals included."""
    model: Path = tiny.save_model(LlamaConfig(**tiny.SHAPE | {"vocab_size": 1024}), tmp_path)
    done = run_torchrun(BYTES, 2, [str(model)])
    for rank in range(2):
        for name in ("ddp", "full_shard", "shard_grad_op", "hybrid", "fsdp2-offload", "streamed"):
            assert f"rank {rank}: {name} keeps its bytes" in done.stdout, f"{done.stdout}\n{done.stderr}"


def test_a_tied_head_is_the_embedding_and_not_streamed(tmp_path):
    """It stays on the device: nothing is copied for it, and the blocks' order of use is not disturbed."""
    shape = tiny.SHAPE | {"tie_word_embeddings": True, "num_hidden_layers": 6}
    model = tiny.save_model(LlamaConfig(**shape), tmp_path)
    options = {"model_name": model, "dataset": "dummy", "precision": "fp32", "lora_rank": 2} | STREAMED
    with built(options) as ours:
        streamer = next(iter(ours.model.blocks.values())).frozen.acquire.func.__self__
        assert ours.model.is_tied()
        assert ours.model.embedding[0].frozen.acquire is None
        ids = torch.randint(0, 264, (1, 8), device=ours.world.device)

        def step() -> int:
            before = streamer.copied
            ours.backward(ours.loss(ids, ids, 7.0))
            return (streamer.copied - before) // streamer.units[0].frozen.layout.nbytes

        step()
        buffers = ours.placement.buffers
        assert 1 < buffers < 6
        assert step() == 2 * (6 - buffers), "the blocks that are in a buffer where a pass turns are not copied again"
