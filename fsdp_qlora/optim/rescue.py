"""The end of training on a rank that saves alone, because a peer is gone: no step may update after that."""

import torch
from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.exchange.base import Exchange


class Rescue:
    """Whether a rescue has begun, for the host to ask and for streams to read."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._begun = False
        self._flag = torch.zeros((), pin_memory=world.device.type == "cuda")  # `_begun`, for streams

    def begin(self, exchange: Exchange) -> None:
        """Release this rank's streams from waits for its peers: reduced gradients are incomplete from now on."""
        self._begun = True
        self._flag.fill_(1.0)
        exchange.release_waits()

    def flag(self) -> Tensor:
        """Return float32 [], not 0 if the rescue has begun by the time the current stream gets here."""
        return self._flag.to(self.world.device, non_blocking=True)

    def check(self) -> None:
        """Raise RuntimeError if the rescue has begun."""
        if self._begun:
            raise RuntimeError("remote process exited, so the adapter is being saved without it")
