"""Models on the meta device as a run plans them, and a meter of what ordinary operators allocate."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import bitsandbytes
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from fsdp_qlora.adapters.table import choose_adapter
from fsdp_qlora.config.parse import parse
from fsdp_qlora.distributed.world import World
from fsdp_qlora.models.assemble import Recipe, assemble
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.fuse import Fusion, fuse
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.models.skeleton import build
from fsdp_qlora.plan.metering import ROUND
from fsdp_qlora.plan.shape import META
from fsdp_qlora.weights.codecs import NF4, Codec, finite
from tests.support.runs import flags

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=META)


@dataclass
class Meter(TorchDispatchMode):
    """live: bytes alive now; peak: most since `mark`."""

    peak: int = 0
    on: str = "meta"  # the device whose tensors count
    _known: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live()
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.on:
                self.add(tensor)
        self.peak = max(self.peak, self.live())
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def live(self) -> int:
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
        return sum(-(-nbytes // ROUND) * ROUND for _, nbytes in self._known.values())

    def mark(self) -> int:
        """Begin to count anew; bytes alive now."""
        self.peak = self.live()
        return self.peak


def encode_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let NF4 and plain numbers be encoded on the meta device, where there are no numbers to look at."""
    monkeypatch.setattr(finite, "all_finite", lambda numbers: True)
    # Made once, on the device of the first call.
    monkeypatch.setitem(bitsandbytes.functional.name2qmap, "dynamic", bitsandbytes.functional.create_dynamic_map())


def planned(hf_config: PretrainedConfig, codec: Codec | None = None, **options: Any) -> tuple[CausalModel, Any, Fusion]:
    """A model on meta, fused, as a run with these options has it when it asks for a plan; its options; its fusion."""
    config = parse(flags({"model_name": "none", "dummy_weights": True} | options))
    precision = Precision(torch.bfloat16, torch.bfloat16)
    kind = choose_adapter(config.model.train_type)
    recipe = Recipe(precision, lambda name: codec or NF4(True), remat="non_reentrant", shards=1, adapter=kind)
    passes = partial(fuse, config, META, choose=lambda *_: "cudnn")
    model, fusion = assemble(build(hf_config, precision, "eager"), recipe, config.adapter, passes)
    return model, config, fusion
