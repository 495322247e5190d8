"""New adapter values cross between ranks behind the next forward: each block waits for its own, and for no others."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from fsdp_qlora.config.parse import parse
from fsdp_qlora.exchange.base import Pending
from fsdp_qlora.exchange.collectives import Collectives
from fsdp_qlora.optim import adapter_group, parameter_gather
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.training.step import Stepper
from tests.support import tiny
from tests.support.built import Built, built
from tests.support.runs import flags
from tests.support.torchrun import run_torchrun


@dataclass
class Late:
    """A gather of two ranks that brings the other's values only when it is waited for: half of them are NaN before."""

    whole: Tensor
    values: Tensor
    index: int
    events: list[tuple[str, int]]

    def wait(self) -> None:
        self.events.append(("wait", self.index))
        self.whole.copy_(self.values)

    def is_completed(self) -> bool:
        return ("wait", self.index) in self.events


@dataclass
class Half:
    """Rank 0 of two over a model of three blocks; rank 1 has the same values, and its gathers come late."""

    ours: Built
    adapters: ShardedAdapters
    events: list[tuple[str, int]] = field(default_factory=list)
    widens: bool = False

    def all_gather(self, whole: Tensor, shard: Tensor) -> Late:
        index = next(i for i, group in enumerate(self.adapters.groups) if group.working is whole)
        assert shard.data_ptr() == whole.data_ptr()
        values = self.values[index].to(whole.dtype)
        assert torch.equal(shard, values[: shard.numel()]), "gathered before it was written"
        whole[shard.numel() :] = torch.nan
        self.events.append(("start", index))
        return Late(whole, values, index, self.events)

    def release_waits(self) -> None:
        pass

    def update(self) -> None:
        """New values for all adapters, as an optimizer step gives them."""
        device = self.ours.world.device
        self.values = [torch.randn(group.working.numel(), device=device) * 0.1 for group in self.adapters.groups]

        def step() -> None:
            for group, values in zip(self.adapters.groups, self.values, strict=True):
                group.master.data.copy_(values[: group.master.numel()])

        self.adapters.update(step)
        self.adapters.publish()

    def forward(self) -> float:
        ids = torch.arange(4, 24, device=self.ours.world.device)[None]
        return self.ours.loss(ids, ids, 19.0).item()


OPTIONS = {"dataset": "dummy", "precision": "fp32", "lora_rank": 4, "fused": "false", "train_type": "lora"}


@pytest.fixture(params=["false", "true"], ids=["generic", "fused"])
def half(request, tmp_path):
    model = tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path)
    options = OPTIONS | {"model_name": model, "fused": request.param}
    with built(options) as ours:
        pair = replace(ours.world, size=2)
        half = Half(ours, ShardedAdapters(ours.model, pair, parse(flags(options)), accumulates=False))
        for index, block in enumerate(ours.model.blocks.values()):
            block.register_forward_hook(lambda *_, index=index: half.events.append(("forward", index)))
        half.adapters.exchange = half
        yield half


def test_each_block_waits_for_its_own_adapters_when_its_forward_begins(half):
    before = half.forward()
    assert half.events == [("forward", i) for i in range(3)]
    half.events.clear()
    half.update()
    assert half.events == [("start", i) for i in range(3)], "all on their way, in forward order, and none waited for"
    half.events.clear()
    after = half.forward()
    assert half.events == [(what, i) for i in range(3) for what in ("wait", "forward")]
    half.events.clear()
    assert half.forward() == after, "a second micro-batch sees the same"
    assert half.events == [("forward", i) for i in range(3)], "and has nothing to wait for"
    for group, values in zip(half.adapters.groups, half.values, strict=True):
        group.working.data.copy_(values)
    assert half.forward() == after, "every block saw all of its new values"
    assert after == after
    assert abs(after - before) > 1e-3


def test_later_gathers_start_behind_the_forward_and_none_is_forgotten(half, monkeypatch):
    monkeypatch.setattr(parameter_gather, "INITIAL_GATHERS", 1)
    half.update()
    assert half.events == [("start", 0)]
    assert not half.adapters.has_arrived()
    half.events.clear()
    half.forward()
    steps = [("start", 1), ("wait", 0), ("forward", 0), ("start", 2), ("wait", 1), ("forward", 1), ("wait", 2)]
    assert half.events == [*steps, ("forward", 2)]
    half.update()
    half.events.clear()
    list(half.ours.model.blocks.values())[2].before_forward[-1]()  # the blocks before it are left out
    assert half.events == [("start", 1), ("start", 2), ("wait", 2)]
    half.adapters.wait()
    half.update()
    half.adapters.wait()
    assert half.adapters.has_arrived()


def test_evaluation_waits_too(half):
    half.update()
    with torch.no_grad():
        assert half.forward() == half.forward()
    assert [what for what, _ in half.events].count("wait") == 3


def test_what_no_forward_waited_for_is_waited_for_before_it_is_overwritten(half):
    half.update()
    with pytest.raises(AssertionError, match="would be overwritten"):
        half.adapters.publish()
    half.adapters.begin_micro_batch(last=True)
    half.adapters.reduction._next = -1  # no block took part, and there is no other rank to reduce with
    half.adapters.finish()
    assert [i for what, i in half.events if what == "wait"] == [0, 1, 2]
    half.update()
    zeros = {n: torch.zeros(p.shape) for g in half.adapters.groups for n, p in zip(g.names, g.params, strict=True)}
    half.adapters.load(zeros)
    assert [i for what, i in half.events if what == "wait"] == [0, 1, 2] * 2
    assert not any(group.working.any() for group in half.adapters.groups), "and not after it was loaded"


def test_nothing_is_updated_after_a_rescue(half):
    half.update()
    half.forward()
    half.adapters.working_tensors()
    with pytest.raises(RuntimeError, match="remote process exited"):
        half.update()


def test_a_rescue_knows_what_has_not_arrived(half, monkeypatch):
    monkeypatch.setattr(parameter_gather, "ARRIVAL_SECONDS", 0.05)
    training = parse(flags(OPTIONS | {"model_name": "any"})).training
    stepper = Stepper(half.ours.model, half.adapters, training, 9, half.ours.world)
    assert (stepper.done, stepper.publishing) == (0, False)
    stepper._begun = 1
    assert (stepper.done, stepper.publishing) == (0, True), "in the middle of the update"
    half.update()
    stepper._updated = 1
    assert (stepper.done, stepper.publishing) == (0, True), "on its way"
    half.adapters.groups[0].wait()
    assert (stepper.done, stepper.publishing) == (0, True), "some of it"
    half.adapters.wait()
    assert (stepper.done, stepper.publishing) == (1, False)

    def fail() -> None:
        raise RuntimeError("Connection closed by peer")

    half.update()
    half.adapters.wait()
    half.adapters.parameter_gather._started[1].wait = fail
    assert (stepper.done, stepper.publishing) == (0, True), "over, but not well"


def test_a_few_blocks_are_updated_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_group, "BLOCKS_PER_UPDATE", 2)
    model = tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path)
    with built(OPTIONS | {"model_name": model, "precision": "bf16"}) as ours:
        ids = torch.arange(4, 24, device=ours.world.device)[None]
        ours.adapters.begin_micro_batch(last=True)
        ours.loss(ids, ids, 19.0).backward()
        ours.adapters.finish()
        parameters, seen = ours.adapters.parameters(), []
        assert not any(p.numel() for p in parameters), "float32 beside bfloat16 before"
        ours.adapters.update(lambda: seen.append([p.grad is not None and p.numel() > 0 for p in parameters]))
        assert not any(p.numel() for p in parameters), "and after"
    assert seen == [[True, True, False], [False, False, True]]


class Summing(Collectives):
    """An exchange with ranks whose gradients are zero."""

    def __init__(self, rank: int) -> None:
        self.rank, self.wholes = rank, []

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> Pending:
        self.wholes.append(whole.clone())
        shard.copy_(whole.view(-1, shard.numel())[self.rank])
        return Late(shard, shard.clone(), 0, [])


@pytest.mark.slow
@pytest.mark.parametrize("no_sync", ["false", "true"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_that_do_not_divide_by_the_ranks_are_padded_with_zeros(no_sync, dtype, tmp_path):
    model = tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path)
    options = OPTIONS | {"model_name": model, "lora_rank": 3, "lora_target_modules": "q_proj", "reduce_dtype": dtype}
    options |= {"no_sync": no_sync, "gradient_accumulation_steps": 2}
    with built(options) as ours:
        ids = torch.arange(4, 24, device=ours.world.device)[None]
        truth = ours.backward(ours.loss(ids, ids, 1.0) + ours.loss(ids, ids, 1.0))
        slices = []
        for rank in range(5):  # 3 * (64 + 64) = 384 values of a block are 5 * 77 - 1
            adapters = ShardedAdapters(
                ours.model, replace(ours.world, rank=rank, size=5), parse(flags(options)), accumulates=True
            )
            adapters.exchange = summing = Summing(rank)
            for last in (False, True):
                adapters.begin_micro_batch(last)
                ours.loss(ids, ids, 1.0).backward()
            adapters.finish()
            assert len(summing.wholes) == (3 if no_sync == "true" else 6)
            assert all(whole.numel() == 385 and whole[-1] == 0 for whole in summing.wholes)
            slices.append(torch.stack(adapters.gradients()))
    flat = torch.cat(slices, dim=1)
    assert not flat[:, -1].any()
    expected = torch.cat([t.flatten() for t in truth.values()]).view(3, -1)
    assert expected.any()
    torch.testing.assert_close(
        flat[:, :-1], expected.to(flat.device), rtol=1e-4 if dtype == "fp32" else 1e-2, atol=1e-5
    )


@pytest.mark.slow
def test_every_block_is_reduced_in_every_micro_batch_whatever_took_part_in_it(tmp_path):
    """Else a rank on which all blocks took part would reduce more often than another."""
    model = tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path)
    options = OPTIONS | {"model_name": model, "lora_rank": 3, "lora_target_modules": "q_proj"}
    with built(options | {"gradient_accumulation_steps": 2}) as ours:
        adapters = ShardedAdapters(ours.model, replace(ours.world, size=2), parse(flags(options)), accumulates=True)
        adapters.exchange = summing = Summing(0)
        ids = torch.arange(4, 24, device=ours.world.device)[None]
        adapters.begin_micro_batch(last=False)  # no gradient comes
        adapters.begin_micro_batch(last=True)
        assert [whole.any().item() for whole in summing.wholes] == [False] * 3
        ours.loss(ids, ids, 1.0).backward()
        adapters.finish()
        assert [whole.any().item() for whole in summing.wholes] == [False] * 3 + [True] * 3


TWO = """
    import sys, time
    import torch
    from fsdp_qlora.config.options import LaunchOptions
    from fsdp_qlora.distributed.world import open_world
    from fsdp_qlora.exchange.collectives import Collectives
    from fsdp_qlora.exchange.host import HostExchange
    from tests.support.built import build_in
    from tests.support.on_host import OnHost

    class Later:
        def __init__(self, *arguments):
            self.arguments = arguments
        def wait(self):
            Collectives().all_gather(*self.arguments).wait()
        def is_completed(self):
            return True

    class Late(Collectives):
        def all_gather(self, whole, shard):
            return Later(whole, shard)

    options = {"model_name": sys.argv[1], "dataset": "dummy", "precision": sys.argv[2], "lora_rank": 3,
               "fused": "false", "train_type": "lora", "lora_target_modules": "q_proj,down_proj"}
    with open_world(LaunchOptions(), 0) as world:
        def through_host(adapters):
            exchange = (HostExchange if world.device.type == "cuda" else OnHost)(adapters.largest, world)
            assert exchange.fault() == ""
            return exchange

        def steps(exchange_of):
            ours = build_in(world, options)
            adapters, losses = ours.adapters, []
            adapters.exchange = exchange_of(adapters)
            ids = torch.arange(5, 25, device=world.device)[None] + world.rank
            for step in range(3):
                for micro in range(2):
                    adapters.begin_micro_batch(last=micro == 1)
                    loss = ours.loss(ids + micro, ids + micro, 76.0)
                    loss.backward()
                    losses.append(loss.item())
                adapters.finish()
                adapters.update(torch.optim.SGD(adapters.parameters(), lr=0.5).step)
                adapters.publish()
                adapters.zero_grad()
            masters = adapters.named_tensors()
            working = adapters.working_tensors()
            dtype = ours.model.precision.compute
            assert all(torch.equal(masters[name].to(dtype), working[name].to(dtype)) for name in masters)
            assert losses[-1] < losses[1]
            return losses, masters
        now = steps(lambda _: Collectives())
        for other in (steps(lambda _: Late()), steps(through_host)):
            assert now[0] == other[0]
            assert all(torch.equal(now[1][name], other[1][name]) for name in now[1])
        sys.stdout.write(f"rank {world.rank}: the same\\n")
    """


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_learn_the_same_however_late_the_gathers_come_and_by_whichever_way(tmp_path, precision):
    model = tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path)
    done = run_torchrun(TWO, 2, [str(model), precision])
    for rank in range(2):
        assert f"rank {rank}: the same" in done.stdout, f"{done.stdout}\n{done.stderr}"
