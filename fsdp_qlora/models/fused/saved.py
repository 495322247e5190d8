"""What a fused block holds from its forward to its backward, on the device or offloaded to host memory."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fsdp_qlora.memory.activation_offload import ActivationOffload, Offloaded
from fsdp_qlora.models.fused.attention import AttentionSaved
from fsdp_qlora.models.fused.copies import whole_rows
from fsdp_qlora.models.fused.gated_mlp import GatedMlpSaved


@dataclass
class SavedBlock:
    """What a block holds from its forward to its backward."""

    h: Tensor  # [B, S, H]
    h2: Tensor | None  # [T, H]; None: to be recomputed, with all of `attention` or from its `projected`
    attention: AttentionSaved | None
    mlp: GatedMlpSaved
    # (owner, key, columns) of each tensor now in host memory. Names, not the owners: a circle would keep tensors alive.
    _offloaded: list[tuple[str, str, int]] = field(default_factory=list)

    def offload(self, offload: ActivationOffload) -> Offloaded:
        """Offload every tensor that has a row of at least H numbers per token."""
        slots, tokens = self._slots(), self.h.shape[0] * self.h.shape[1]
        self._offloaded = [(name, key, self._owner(name)[key].shape[-1]) for name, key in slots]
        offloaded = offload.offload([whole_rows(self._owner(name)[key]) for name, key in slots], tokens)
        for name, key in slots:
            self._owner(name)[key] = None
        return offloaded

    def restore(self, offload: ActivationOffload, offloaded: Offloaded) -> None:
        """Restore what was offloaded."""
        slots, self._offloaded = self._offloaded, []
        for (name, key, columns), tensor in zip(slots, offload.restore(offloaded), strict=True):
            self._owner(name)[key] = tensor if tensor.shape[-1] == columns else tensor[..., :columns]

    def _slots(self) -> list[tuple[str, str]]:
        """Return (owner, key) of each large tensor."""
        slots = [("", "h"), ("", "h2")]
        if self.attention is not None:
            slots += [("attention", key) for key in self.attention.OFFLOADED]
        slots += [("mlp", key) for key in self.mlp.OFFLOADED]
        return [(name, key) for name, key in slots if self._owner(name)[key] is not None]

    def _owner(self, name: str) -> dict[str, Any]:
        return vars(getattr(self, name)) if name else vars(self)
