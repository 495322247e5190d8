"""FLOP/s of attention's passes, in each form in which a model's blocks compute it; for `rates.py`.

B batch, S sequence, N query heads, K key/value heads, D head dim.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsdp_qlora.kernels.attention import Masking, attend, attend_backward, for_segments
from fsdp_qlora.kernels.attention_on_meta import BACKWARD, keys_seen
from fsdp_qlora.kernels.segments import Segments, segments_of
from fsdp_qlora.models.attention import BACKEND_OF
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.calibrate.timing import seconds
from fsdp_qlora.plan.inputs import Facts, generic_windows

MOST_TOKENS = 4096  # of a micro-batch that is measured, and of a row where a score of every pair of tokens is made
MOST_CONTEXT = 32768  # of a row in one kernel, whose rates still grow there
ROW_BY_ROW = ("math", "cpu", "sdpa", "eager")  # backends that may make those scores
GENERIC = ("sdpa", "eager")  # transformers' own


class Form(NamedTuple):
    """How a block computes attention. backend: of kernels/attention.py; of a generic block transformers' name."""

    masking: Masking
    backend: str


def forms_of(model: CausalModel, facts: Facts, device: torch.device) -> Counter[Form]:
    """Return how many blocks compute attention in each form."""
    if not model.fused_blocks:
        name = model.backbone.config._attn_implementation
        windows = generic_windows(model.backbone.config, len(model.blocks))
        return Counter(Form(Masking(1.0, window), BACKEND_OF.get(name, name)) for window in windows)
    found = Counter[Form]()
    for block in model.fused_blocks:
        masking, backend = block.spec.attention.masking, block.backend
        if facts.flat:
            backend = for_segments(backend, device.type, block.dtype, facts.head_dim, masking)
        found[Form(masking, backend)] += 1
    return found


def attention(facts: Facts, forms: Mapping[Form, int], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the FLOP/s of both passes, counting the keys that are seen, over all blocks. forms: blocks of each."""
    flops = forward = backward = 0.0
    for form, count in forms.items():
        seen = count * keys_seen(facts.usual_row, form.masking.window)
        rates = _rates(facts, form, dtype, device)
        flops, forward, backward = flops + seen, forward + seen / rates[0], backward + seen / rates[1]
    return {"attention_forward": flops / forward, "attention_backward": flops / backward}


def _rates(facts: Facts, form: Form, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return the FLOP/s of one form, forward and backward."""
    masking, backend = form
    s = min(facts.usual_row, MOST_TOKENS if backend in ROW_BY_ROW else MOST_CONTEXT)
    b = max(1, min(facts.usual_tokens, MOST_TOKENS) // s)
    segments = None
    if facts.flat:
        segments, b, s = segments_of([s] * b).to(device), 1, b * s
    q, d_out = (torch.randn(b, s, facts.heads, facts.head_dim, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(b, s, facts.kv_heads, facts.head_dim, device=device, dtype=dtype) for _ in range(2))
    seen = keys_seen(s if segments is None else segments.lengths[0], masking.window)
    flops = 4 * b * s * seen * facts.queries
    if backend in GENERIC:
        forward, both = _generic(form, q, k, v, d_out)
        return flops / forward, BACKWARD * flops / max(both - forward, 1e-9)
    given = (masking, backend, segments)
    forward = seconds(lambda: attend(q, k, v, *given))
    if backend == "flash_attn":  # its stats are a graph, which backward uses up
        both = seconds(lambda: _both(q, k, v, d_out, *given))
        return flops / forward, BACKWARD * flops / max(both - forward, 1e-9)
    out, stats = attend(q, k, v, *given)
    return flops / forward, BACKWARD * flops / seconds(lambda: attend_backward(d_out, q, k, v, out, stats, *given))


def _both(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, masking: Masking, backend: str, segments: Segments | None
) -> None:
    out, stats = attend(q, k, v, masking, backend, segments)
    attend_backward(d_out, q, k, v, out, stats, masking, backend, segments)


def _generic(form: Form, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> tuple[float, float]:
    """Return the seconds of transformers' own attention forward, and forward and backward."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.llama.modeling_llama import eager_attention_forward

    s, window = q.shape[1], form.masking.window
    queries, keys, values = (x.transpose(1, 2).requires_grad_() for x in (q, k, v))
    module = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], is_causal=True, training=True)
    mask = None
    if form.backend == "eager" or (window is not None and window < s):  # as Hugging Face's model makes it
        mask = torch.ones(s, s, dtype=torch.bool, device=q.device).tril().triu(1 - min(window or s, s))[None, None]
    if mask is not None and form.backend == "eager":
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    attend_there: Callable[..., Any] = eager_attention_forward if form.backend == "eager" else sdpa_attention_forward
    forward = partial(attend_there, module, queries, keys, values, mask, scaling=form.masking.scale)

    def both() -> object:
        return torch.autograd.grad(forward()[0], (queries, keys, values), d_out)

    return seconds(forward), seconds(both)
