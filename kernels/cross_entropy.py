"""The LM head and its cross-entropy as one op over chunks of tokens: the full logits never exist.

At vocabulary 128,256 the logits of 8,192 tokens are 2 GB in bf16, and their float32 copy and gradient several times
that. But the loss is a sum over tokens, so its gradient needs one chunk's logits at a time, and all of it is at hand in
the forward pass:

    for each chunk of tokens:   logits = h @ W.T ;  loss += -log softmax(logits)[label]
                                d_logits = softmax(logits) - onehot(label)      (written over the logits)
                                d_h = d_logits @ W

So backward only multiplies the stored d_h by the incoming scalar: neither logits nor the head's weight (which may have
been streamed in and gone again) are needed then. The price is that d_h, tokens x hidden, is computed even if nobody
calls backward, which is why it is not where no gradient is wanted. The loss is a SUM over labels: how many labels there
are is known only over all micro-batches and ranks, so the caller divides.

A head's transformation of its logits is softcap(scale * x), with softcap(x) = c * tanh(x / c) (Gemma 2's; scale:
Cohere's and Granite's), done in float32 as the softmax is.

T tokens, H hidden, V vocabulary.
"""

from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import empty, empty_like, launch, next_power_of_2, no_autocast, on_triton, tl, triton
from fsdp_qlora.kernels.tanh import tanh

IGNORE = -100
Head = tuple[float | None, float, float, int]  # softcap, logit scale, divisor, ignored label
_CHUNK_LOGITS = 1 << 27  # logits held at a time, at most: 256 MiB in bf16; 1,024 tokens at vocabulary 128,256
_CHUNK_TOKENS = 2048  # at a time, at most: at vocabulary 32,000 tiles enough for 15 rounds of a large GPU


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are there at a time."""
    return max(256, min(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary // 256 * 256))


def linear_cross_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: torch.Tensor | None = None,
    divisor: float = 1.0,
    chunk: int | None = None,
    label_count: int | None = None,
    ignore_index: int = IGNORE,
) -> torch.Tensor:
    """Sum over labelled tokens of -log softmax(head(hidden))[label], a float32 scalar (float64 for float64 inputs).

    hidden_TH, weight_VH, bias [V]: of one floating dtype and device (autocast casts them). labels_T: int64, row t's
    label is what token t must predict (shifted by the caller), `ignore_index` for none. Differentiable in hidden,
    weight and bias, once: the gradient's buffer is handed over in backward.
    divisor: the sum is divided by it, in float32 before gradients are rounded. An incoming gradient that is no power of
    two rounds a bf16 gradient once more, so a known normaliser (the global label count) belongs here.
    chunk: tokens at a time, default `chunk_tokens`. label_count: how many labels are not `ignore_index`, if the caller
    knows: rows without a label then cost nothing. On the CPU it is counted if not given; on a GPU counting would wait
    for all queued work, so without it every row is computed.
    A label outside the vocabulary makes the loss NaN on a GPU and raises IndexError or RuntimeError on a CPU.
    Raises ValueError on wrong shapes or dtypes.
    """
    kind = hidden_TH.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_TH, weight_VH = hidden_TH.to(dtype), weight_VH.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(hidden_TH, weight_VH, labels_T, bias)
    n_tokens, vocabulary = labels_T.numel(), weight_VH.shape[0]
    if chunk is None:
        chunk = chunk_tokens(vocabulary)
    if label_count is None and kind == "cpu":
        label_count = int((labels_T != ignore_index).sum())
    rows = None
    if label_count is not None and label_count < n_tokens:
        # A stable sort brings the labelled rows to the front, in order, without the device having to tell the host.
        rows = torch.argsort((labels_T == ignore_index).to(torch.uint8), stable=True)[:label_count]
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_TH, weight_VH, bias)]
    with no_autocast(hidden_TH):
        loss: torch.Tensor = _LinearCrossEntropy.apply(
            hidden_TH, weight_VH, bias, labels_T, rows, wanted, min(chunk, max(n_tokens, 1)),
            (softcap, logit_scale, float(divisor), ignore_index),
        )  # fmt: skip
    return loss


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden and weight must be [T, H] and [V, H], got {hidden.shape} and {weight.shape}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{hidden.shape[0]}], got {labels.dtype} {tuple(labels.shape)}")
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise ValueError(f"weight and bias must be {hidden.dtype} as hidden is, got {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        rows: torch.Tensor | None,
        wanted: list[bool],
        chunk: int,
        head: Head,
    ) -> torch.Tensor:
        # softmax and sums in float32, in float64 for float64
        wide = torch.promote_types(hidden.dtype, torch.float32)
        labels = labels.contiguous() if rows is None else labels[rows]
        n_rows, vocabulary = labels.numel(), weight.shape[0]
        losses = torch.zeros(n_rows, dtype=wide, device=hidden.device)
        d_hidden = d_weight = d_bias = None
        if wanted[0]:
            d_hidden = empty_like(hidden) if rows is None else empty_like(hidden).zero_()
        if wanted[1]:
            d_weight = torch.zeros_like(weight, dtype=wide)
        if wanted[2] and bias is not None:
            d_bias = torch.zeros_like(bias, dtype=wide)
        width = -(-vocabulary // 16) * 16  # rows start aligned whatever the vocabulary
        buffer = empty((min(chunk, n_rows), width), hidden)

        for start in range(0, n_rows, chunk):
            part = slice(start, min(start + chunk, n_rows))
            x = hidden[part] if rows is None else hidden[rows[part]]
            logits = buffer[: x.shape[0], :vocabulary]
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)
            _losses_and_gradient(logits, labels[part], losses[part], any(wanted), *head)
            if d_hidden is not None:
                if rows is None:
                    torch.mm(logits, weight, out=d_hidden[part])
                else:
                    d_hidden[rows[part]] = logits @ weight
            if d_weight is not None:
                d_weight.add_(_unrounded(logits.t(), x, wide))
            if d_bias is not None:
                d_bias.add_(logits.sum(0, dtype=wide))

        ctx.gradients = d_hidden, d_weight, d_bias
        ctx.dtype = hidden.dtype
        return losses.sum() / head[2]

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy's gradient was already taken: it cannot be differentiated twice")
        gradients, ctx.gradients = ctx.gradients, None
        found = [None if g is None else g.mul_(d_loss).to(ctx.dtype) for g in gradients]
        return *found, None, None, None, None, None


def _unrounded(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `dtype`, where a GPU can: a sum over chunks should not round each of them to 16 bits."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda and a.dtype != dtype else a @ b


def _losses_and_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    gradient: bool,
    softcap: float | None,
    scale: float,
    divisor: float,
    ignore: int,
) -> None:
    """losses[t] = the loss of row t, 0 where its label is `ignore`; if `gradient`, its gradient over the logits."""
    if on_triton(logits):
        _launch(logits, labels, losses, gradient, softcap, scale, divisor, ignore)
    else:
        _plain(logits, labels, losses, gradient, softcap, scale, divisor, ignore)


# ---- meaning, and the path on a CPU


def _plain(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    gradient: bool,
    softcap: float | None,
    scale: float,
    divisor: float,
    ignore: int,
) -> None:
    z = logits.to(losses.dtype) if scale == 1.0 else logits.to(losses.dtype) * scale
    if softcap is not None:
        bent = torch.tanh(z / softcap)
        z = bent * softcap
    live = labels != ignore
    label = torch.where(live, labels, 0)[:, None]
    # Not logsumexp(z) - z[label]: of two numbers near 40 whose difference is a small loss, little of it is left.
    highest = z.amax(dim=1, keepdim=True)
    exps = torch.exp(z - highest)
    total = exps.sum(dim=1, keepdim=True)
    losses.copy_(torch.where(live, (torch.log(total) + (highest - z.gather(1, label)))[:, 0], 0))
    if not gradient:
        return
    d_z = exps.div_(total)
    d_z.scatter_add_(1, label, torch.full_like(total, -1.0))
    if softcap is not None:
        d_z *= 1 - bent * bent
    d_z *= live[:, None] * (scale / divisor)
    logits.copy_(d_z)


# ---- Triton: one program a row, two walks along it


@triton.jit
def _bend(x, scale, softcap, SOFTCAP: tl.constexpr):
    """What the head does to a logit, in float32, and the tanh in that."""
    z = x.to(tl.float32) * scale
    bent = z
    if SOFTCAP:
        bent = tanh(z / softcap)
        z = softcap * bent
    return z, bent


@triton.jit
def _row_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    row_stride,
    ignore,
    scale,
    d_scale,  # scale / divisor
    softcap,
    VOCABULARY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    column = tl.arange(0, TILE)
    if label == ignore:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            zero = tl.zeros([TILE], logits_ptr.dtype.element_ty)
            for start in range(0, VOCABULARY, TILE):
                tl.store(logits_ptr + start + column, zero, mask=start + column < VOCABULARY)
    else:
        # A label outside the vocabulary is a bug upstream: NaN, so that the run stops.
        inside = (label >= 0) & (label < VOCABULARY)
        target = _bend(tl.load(logits_ptr + label, mask=inside, other=float("nan")), scale, softcap, SOFTCAP)[0]
        # Each lane keeps its own running maximum and sum; they meet once, at the end.
        high = tl.full([TILE], -1e30, tl.float32)
        total = tl.zeros([TILE], tl.float32)
        for start in range(0, VOCABULARY, TILE):
            live = start + column < VOCABULARY
            z = _bend(tl.load(logits_ptr + start + column, mask=live, other=0.0), scale, softcap, SOFTCAP)[0]
            z = tl.where(live, z, -1e30)
            higher = tl.maximum(high, z)
            total = total * tl.exp(high - higher) + tl.exp(z - higher)
            high = higher
        highest = tl.max(high, axis=0)
        sum_exp = tl.sum(total * tl.exp(high - highest), axis=0)
        tl.store(losses_ptr + row, tl.log(sum_exp) + (highest - target))
        if GRADIENT:
            inverse = 1.0 / sum_exp
            for start in range(0, VOCABULARY, TILE):
                live = start + column < VOCABULARY
                z, bent = _bend(tl.load(logits_ptr + start + column, mask=live, other=0.0), scale, softcap, SOFTCAP)
                d_z = tl.exp(z - highest) * inverse - tl.where(start + column == label, 1.0, 0.0)
                if SOFTCAP:
                    d_z = d_z * (1 - bent * bent)
                d_x = (d_z * d_scale).to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + column, d_x, mask=live)


@cost_of(_row_kernel)
def _cost(logits: torch.Tensor, *_: Any, GRADIENT: bool, **__: Any) -> Cost:
    """Read twice and written once, or read once."""
    return Cost(bytes=(3 if GRADIENT else 1) * logits.nbytes)


def _launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    gradient: bool,
    softcap: float | None,
    scale: float,
    divisor: float,
    ignore: int,
) -> None:
    vocabulary = logits.shape[1]
    tile = min(8192, next_power_of_2(vocabulary))
    launch(
        _row_kernel,
        (logits.shape[0],),
        logits,
        labels,
        losses,
        logits.stride(0),
        ignore,
        float(scale),
        float(scale / divisor),
        float(softcap or 0.0),
        VOCABULARY=vocabulary,
        SOFTCAP=softcap is not None,
        GRADIENT=gradient,
        TILE=tile,
        num_warps=16 if tile >= 4096 else 8 if tile == 2048 else 4,
    )
