"""Our model in this process, built and loaded from options as `run.py` does it, without the training loop around it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.parse import parse
from fsdp_qlora.distributed.world import World, open_world
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.fuse import Fusion
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.placement.base import Placement
from fsdp_qlora.plan.plan import Plan
from fsdp_qlora.plan.planning import keep_activations
from fsdp_qlora.session import choose_compute, prepare
from tests.support.runs import Options, flags


@dataclass
class Built:
    model: CausalModel
    adapters: ShardedAdapters
    placement: Placement
    fusion: Fusion
    world: World

    def loss(self, ids_BS: Tensor, labels_BS: Tensor, divisor: float) -> Tensor:
        """Forward: labels aligned with ids, -100 for none, as Hugging Face takes them."""
        following = torch.nn.functional.pad(labels_BS[:, 1:], (0, 1), value=-100).flatten()
        places = (following != -100).nonzero().squeeze(1)
        ids, places, labels = (t.to(self.world.device) for t in (ids_BS, places, following[places]))
        return self.model(ids, places, labels, divisor)

    def backward(self, loss: Tensor) -> dict[str, Tensor]:
        """`path.lora_A` -> this process's gradient of it, as autograd leaves it, on the CPU. One rank only."""
        assert self.world.size == 1
        self.adapters.begin_micro_batch(last=True)
        loss.backward()
        self.adapters.finish()
        found = {}
        for group, flat in zip(self.adapters.groups, self.adapters.gradients(), strict=True):
            pieces = flat[: sum(p.numel() for p in group.params)].split([p.numel() for p in group.params])
            named = zip(group.names, pieces, group.params, strict=True)
            found |= {name: piece.view(p.shape).to("cpu", copy=True) for name, piece, p in named}
        self.adapters.zero_grad()
        return found

    def frozen_bytes(self) -> dict[str, Tensor]:
        """Unit -> all of its bytes, wherever they are. A collective where they are sharded."""
        found = {}
        for unit in self.model.units:
            with unit.frozen.opened():
                flat: Any = unit.frozen.flat.detach()
                flat = flat.full_tensor() if hasattr(flat, "full_tensor") else flat
                found[unit.name] = flat.view(torch.uint8).clone()
        return found

    def logits(self, ids_BS: Tensor) -> Tensor:
        """[B, S, V] on the CPU, before any scale or softcap of the family."""
        with torch.no_grad():
            self.model.rest.bind()
            hidden = self.model.final_norm(
                self.model.backbone(input_ids=ids_BS.to(self.world.device), use_cache=False)[0]
            )
            head = self.model.head
            with head.frozen.opened():
                return (hidden @ head.weight.decode(hidden.dtype).T).cpu()


@contextmanager
def built(options: Options) -> Iterator[Built]:
    """The model that `train.py` with these options would train, in a process group of its own."""
    config = parse(flags(options))
    with open_world(config.launch, config.training.seed) as world:
        yield build_in(world, options)


def build_in(world: World, options: Options, change: Callable[[Plan], Plan] = lambda plan: plan) -> Built:
    """change: what to do otherwise than planned."""
    config = parse(flags(options))
    session = prepare(config, world, choose_compute(config, world), None)
    plan = change(session.planned.plan)
    session = replace(session, planned=replace(session.planned, plan=plan))
    placement = session.place()
    most_tokens = plan.micro_batch * config.data.context_length
    keep_activations(session.model, plan.blocks, most_tokens, world.device)
    return Built(session.model, session.load(placement), placement, session.fusion, world)
