"""What the host takes to launch a kernel, among all else that it does in a block; for `calibrate.py`.

A whole fused block runs over so few tokens that the GPU is never what is waited for: on small batches and fast cards
the host is what bounds a step.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.fused.scratch import Shared
from fsdp_qlora.models.fused.spec import BlockSpec, Norm
from fsdp_qlora.models.generic_block import DeclaredAdapter, FrozenLinear
from fsdp_qlora.plan.costs import block_costs
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor

FEW_TOKENS = 16  # of the block that measures launches
ROUNDS = 4


def launches(model: CausalModel, facts: Facts, device: torch.device) -> float:
    """Seconds of the host per launch, from a block's two passes over few tokens; without fused blocks, of small ops."""
    if not model.fused_blocks:
        x = torch.zeros(FEW_TOKENS, facts.hidden, dtype=model.precision.compute, device=device)
        return _host_seconds(lambda: [torch.add(x, x) for _ in range(100)], 1) / 100
    h = torch.zeros(1, FEW_TOKENS, facts.hidden, dtype=model.precision.compute, device=device, requires_grad=True)
    cos, sin = (torch.zeros(FEW_TOKENS, facts.head_dim // 2, device=device) for _ in range(2))
    d_out = torch.zeros_like(h)
    alone = standing(model.fused_blocks[0], device)

    def passes() -> None:
        alone(h, cos, sin).backward(d_out)

    cost = block_costs(facts)["input", False]
    return _host_seconds(passes, ROUNDS) / (cost.forward.launches + cost.backward.launches)


def _host_seconds(call: Callable[[], object], rounds: int) -> float:
    """Until the host has queued what `call` launches, the queue being empty before; the best of some rounds."""
    best = float("inf")
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return best


def standing(block: FusedBlock, device: torch.device) -> FusedBlock:
    """A block like a model's, which is still on the meta device, over zero bytes and zero adapters of its own."""
    frozen = FrozenBytes(block.spec.attention.o.weight.home.layout)
    words = torch.zeros(frozen.layout.nbytes // 4, device=device)
    frozen.flat = nn.Parameter(words, requires_grad=False)
    spec, shared = _moved(block.spec, frozen, device), Shared.on(device, block.dtype)
    return replace(block.keeping(Keep.INPUT), spec=spec, shared=shared)


def _moved(spec: BlockSpec, frozen: FrozenBytes, device: torch.device) -> BlockSpec:
    def norm(old: Norm | None) -> Norm | None:
        return None if old is None else replace(old, weight=FrozenTensor(frozen, old.weight.name))

    def linear(old: FrozenLinear) -> FrozenLinear:
        bias = None if old.bias is None else FrozenTensor(frozen, old.bias.name)
        norms = None if old.norms is None else FrozenTensor(frozen, old.norms.name)
        parameters = old.adapter_parameters()
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        adapter = DeclaredAdapter(shapes, old.scale, old.dropout, norms)
        new = FrozenLinear(FrozenTensor(frozen, old.weight.name), bias, old.dtype, adapter)
        for name, p in parameters.items():
            setattr(new, name, nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=device)))
        return new

    attention, mlp = spec.attention, spec.mlp
    first, third = norm(attention.norm), norm(mlp.norm)
    assert first is not None
    assert third is not None
    return BlockSpec(
        replace(
            attention,
            norm=first,
            out_norm=norm(attention.out_norm),
            q_norm=norm(attention.q_norm),
            k_norm=norm(attention.k_norm),
            qkv=tuple(linear(m) for m in attention.qkv),
            o=linear(attention.o),
        ),
        replace(
            mlp,
            norm=third,
            out_norm=norm(mlp.out_norm),
            gate_up=tuple(linear(m) for m in mlp.gate_up),
            down=linear(mlp.down),
        ),
    )
