"""One training step of the real model on the meta device, where nothing is computed: every byte and launch counted.

Triton kernels are replaced by nothing, and cuDNN's attention by the tensors that it makes; everything else, from the
embedding to the optimizer's gradients, is the program's own code. What the allocator would hold is the sum over the
storages that are alive, each rounded up as it does.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from fsdp_qlora.codecs import NF4
from fsdp_qlora.config_parse import parse
from fsdp_qlora.fused import FusedBlock
from fsdp_qlora.fusing import Fusion, fuse
from fsdp_qlora.kernels import attention, cross_entropy, dropout, glu, glu_lora, lora_wide, masters, nf4, rms_norm, rope
from fsdp_qlora.model import CausalModel, Recipe, assemble
from fsdp_qlora.plan.costs import ROUND
from fsdp_qlora.precision import Precision
from fsdp_qlora.shards import ShardedAdapters
from fsdp_qlora.skeleton import build
from fsdp_qlora.world import World
from tests.runs import flags

META = torch.device("meta")
WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=META)
LAUNCHERS = [(nf4, "_launch"), (rms_norm, "_launch_forward"), (rms_norm, "_launch_backward")]
LAUNCHERS += [(glu, "_launch"), (rope, "_launch"), (cross_entropy, "_launch"), (lora_wide, "_launch")]
KERNELS = [(dropout, "_kernel"), (glu_lora, "_kernel"), (masters, "_join_kernel"), (masters, "_split_kernel")]
KERNELS += [(nf4, "_dequantize_rows_kernel")]
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias"}


@dataclass
class Meter(TorchDispatchMode):
    """live: bytes alive now; peak: most since `mark`; launches: kernels since then."""

    peak: int = 0
    launches: int = 0
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
        name = func.overloadpacket.__name__
        if (
            name not in NO_KERNEL
            and not func.is_view
            and any(t.device.type == self.on for t in tree_leaves(out) if torch.is_tensor(t))
        ):
            self.launches += 1
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def live(self) -> int:
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
        return sum(-(-nbytes // ROUND) * ROUND for _, nbytes in self._known.values())

    def mark(self) -> int:
        """Begin to count anew; bytes alive now."""
        self.launches, self.peak = 0, self.live()
        return self.peak


def _cudnn_forward(q: Any, k: Any, v: Any, masking: Any) -> Any:
    return torch.empty_like(q), [torch.empty(q.shape[0], q.shape[2], q.shape[1], 1, device=q.device)]


def _cudnn_backward(d_out: Any, q: Any, k: Any, v: Any, out: Any, stats: Any, masking: Any) -> Any:
    return tuple(torch.empty_like(x) for x in (q, k, v))


# Functions, not mocks, which would keep the tensors that they were called with.
def _yes(*args: Any) -> bool:
    return True


def _no(*args: Any) -> bool:
    return False


def _nothing(*args: Any, **kwargs: Any) -> Any:
    return nullcontext()


class _NoKernel:
    """Stands for a Triton kernel that is launched where its launcher cannot be replaced."""

    def __init__(self, count: Any) -> None:
        self.count = count

    def __getitem__(self, grid: Any) -> Any:
        return self.count


@contextmanager
def without_kernels(meter: Meter) -> Iterator[None]:
    """Triton's and cuDNN's kernels are counted and do nothing."""

    def counted(*args: Any, **kwargs: Any) -> None:
        meter.launches += 1

    with ExitStack() as stack:
        for module in (nf4, rms_norm, glu, glu_lora, rope, cross_entropy, dropout, lora_wide, masters):
            stack.enter_context(mock.patch.object(module, "on_triton", _yes))
        for module, name in LAUNCHERS:
            stack.enter_context(mock.patch.object(module, name, counted))
        for module, name in KERNELS:
            stack.enter_context(mock.patch.object(module, name, _NoKernel(counted)))
        stack.enter_context(mock.patch.object(nf4, "_tables", _nothing))  # kept from the first launch on
        stack.enter_context(mock.patch.object(torch, "autocast", _nothing))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", _no))
        stack.enter_context(mock.patch.dict(attention._FORWARD, cudnn=_cudnn_forward))
        stack.enter_context(mock.patch.dict(attention._BACKWARD, cudnn=_cudnn_backward))
        yield


def planned(hf_config: PretrainedConfig, **options: Any) -> tuple[CausalModel, Any, Fusion]:
    """A model on meta, fused, as a run with these options has it when it asks for a plan; its options; its fusion."""
    config = parse(flags({"model_name": "none", "dummy_weights": True} | options))
    precision = Precision(torch.bfloat16, torch.bfloat16)
    recipe = Recipe(precision, lambda name: NF4(True), remat="non_reentrant", shards=1)
    model = assemble(build(hf_config, precision, "eager"), recipe, config.adapter)
    fusion = fuse(model, config, META)
    for block in model.blocks.values():
        if isinstance(block.fused, FusedBlock):
            block.fused = replace(block.fused, backend="cudnn")
    return model, config, replace(fusion, attention=("cudnn",) if fusion.blocks else ())


@dataclass(frozen=True)
class Metered:
    """Of one step: bytes alive before it, most in it, of which at the end of forward; launches of its two passes."""

    before: int
    peak: int
    after_forward: int
    forward: int
    backward: int


def metered_step(model: CausalModel, config: Any, keep: str) -> Metered:
    """Every block keeps `keep`. Every position is a label."""
    for block in model.blocks.values():
        if isinstance(block.fused, FusedBlock):
            block.fused = replace(block.fused, keep=keep)
    for unit in model.units:
        unit.frozen.flat = torch.nn.Parameter(torch.empty_like(unit.frozen.flat), requires_grad=False)
    model.backbone.rotary_emb.to(META)
    adapters = ShardedAdapters(model, WORLD, config)
    tokens = config.training.batch_size * config.data.context_length
    ids = torch.zeros(config.training.batch_size, config.data.context_length, dtype=torch.int64, device=META)
    places, labels = (torch.zeros(tokens, dtype=torch.int64, device=META) for _ in range(2))
    meter = Meter()
    with without_kernels(meter), meter:
        for tensor in [u.frozen.flat for u in model.units] + [t for g in adapters.groups for t in _of(g)]:
            meter.add(tensor)
        _step(model, adapters, ids, places, labels)  # makes the scratch buffer as large as it will be
        for block in model.blocks.values():
            meter.add(block.fused.scratch.buffer)
        before = meter.mark()
        adapters.begin_micro_batch(last=True)
        loss = model(ids, places, labels, 1.0)
        forward, after_forward = meter.launches, meter.live()
        loss.backward()
        backward = meter.launches - forward
        adapters.finish()
    return Metered(before, meter.peak, after_forward, forward, backward)


@dataclass(frozen=True)
class MeteredBlock:
    """Of one fused block. kept: bytes between its passes; forward, backward: the most in each beside them (forward: its
    input apart); launches of each."""

    kept: int
    forward: int
    backward: int
    launches_forward: int
    launches_backward: int


def metered_block(model: CausalModel, config: Any, keep: str, offload: Any = None) -> MeteredBlock:
    """A block's passes, alone. The input that it keeps counts as kept, as does a gradient that backward is given."""
    block = next(iter(model.blocks.values()))
    block.frozen.flat = torch.nn.Parameter(torch.empty_like(block.frozen.flat), requires_grad=False)
    assert isinstance(block.fused, FusedBlock)
    fused = replace(block.fused, keep=keep, offload=offload, parks=offload is not None)
    batch, context = config.training.batch_size, config.data.context_length
    meter = Meter()
    with without_kernels(meter), meter:
        for m in block.linears().values():
            for matrix in (m.lora_A, m.lora_B):
                meter.add(matrix.data)
        meter.add(block.frozen.flat.data)
        for _ in range(2):  # the first makes the scratch buffer as large as it will be
            h = torch.empty(batch, context, fused.anatomy.down.out_features, dtype=fused.dtype, device=META)
            h.requires_grad_()
            cos, sin = (torch.empty(context, fused.anatomy.head_dim // 2, device=META) for _ in range(2))
            meter.add(fused.scratch.buffer)
            before = meter.mark() - h.nbytes
            out = fused(h, cos, sin)
            forward, launches = meter.peak - before, meter.launches
            d_wide = _handed(fused, out)
            held = meter.mark() - before - d_wide.untyped_storage().nbytes()
            out.backward(d_wide[:, : h.shape[-1]].view(out.shape))
            found = MeteredBlock(held - out.nbytes, forward, meter.peak - before - held, launches, meter.launches)
            fused.scratch.hand(torch.empty(0, device=META))
            del out, d_wide, h
            for m in block.linears().values():
                m.lora_A.grad = m.lora_B.grad = None
    return found


def _handed(fused: FusedBlock, out: torch.Tensor) -> torch.Tensor:
    """The gradient of a block's output with room beside it, as the block after leaves it."""
    rows = out.flatten(0, 1)
    d_wide = lora_wide.wide(rows.shape[0], rows.shape[1] + lora_wide.extra(fused.projection(fused.anatomy.down)), rows)
    fused.scratch.hand(d_wide)
    return d_wide


def _of(group: Any) -> list[torch.Tensor]:
    return [group.working, group.masters._low]


def _step(model: CausalModel, adapters: ShardedAdapters, ids: Any, places: Any, labels: Any) -> None:
    adapters.begin_micro_batch(last=True)
    model(ids, places, labels, 1.0).backward()
    adapters.finish()
    adapters.update(int)
    adapters.publish()
    adapters.zero_grad()
    adapters.wait()
