"""Logits of a merged model beside those of base + adapter, computed with one linear in memory at a time.

Three streams go through one model: the base, base + adapter with nothing rounded, and the files that were written. All
arithmetic is float32, so what differs is the weights and not the dtype of a matmul.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.export.merged import Merged, Piece
from fsdp_qlora.export.merged_folder import MergedModel
from fsdp_qlora.models.skeleton import backbone_of, head_of, is_linear, logit_shape, path_of
from fsdp_qlora.weights.choose import open_weights
from fsdp_qlora.weights.source import Weights

VOCABULARY_ROWS = 8192  # of the head at a time
STREAMS = 3  # base, exact, saved


@dataclass
class Difference:
    """What merging did to the logits of some rows.

    merged: the largest |logit of the merged model - logit of base + adapter|. learnt: the largest |logit of base +
    adapter - logit of the base|. same: positions at which merged and base + adapter have the same first choice."""

    merged: float
    learnt: float
    same: int
    positions: int


class _Triple(nn.Module):
    """A linear over three streams stacked along the rows, each with its own weight, read when it is called."""

    def __init__(self, model: "_Compared", path: str, bias: Tensor | None) -> None:
        super().__init__()
        self.model, self.path, self.bias = model, path, bias

    def forward(self, x: Tensor) -> Tensor:
        base, exact, saved = x.chunk(STREAMS)
        weights = self.model.weights(f"{self.path}.weight")
        out = [F.linear(rows, next(weights), self.bias) for rows in (base, exact, saved)]
        self.model.bar.update()
        return torch.cat(out)


class _Compared:
    """The sources of the three streams' weights."""

    def __init__(self, source: Merged, saved: Weights, bar: "tqdm[Any]") -> None:
        self.source, self.saved, self.bar = source, saved, bar

    def weights(self, name: str) -> Iterator[Tensor]:
        """Yield the three weights of that name in float32, one after the other."""
        piece = self.source.piece(name)
        base = self.source.base(piece)
        yield base.float()
        yield self.source.added(piece, base).float()
        del base
        yield self.read_saved(piece).float()

    def read_saved(self, piece: Piece) -> Tensor:
        return self.saved.read({piece.stored: piece.shape}, self.source.device)[piece.stored].to(self.source.device)


def compare(merged: MergedModel, rows: Sequence[Sequence[int]]) -> Difference:
    """Return how far the written model's logits are from those of base + adapter, on rows of token ids."""
    source = merged.source
    saved = open_weights(ModelOptions(model_name=str(merged.folder)), merged.dtype)
    model = source.build()
    backbone, head, shape = backbone_of(model), head_of(model), logit_shape(model)
    linears = [path for path, module in model.named_modules() if is_linear(module) and module is not head]
    head_path = path_of(model, head)
    used = sorted({token for row in rows for token in row})
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):  # padded behind, where no earlier position looks
        ids[i, : len(row)] = torch.tensor([used.index(token) for token in row])
    real = torch.tensor([[j < len(row) for j in range(longest)] for row in rows]).flatten()
    with tqdm(total=len(linears), desc="comparing", unit="linear", leave=False) as bar, torch.no_grad():
        compared = _Compared(source, saved, bar)
        _place(model, compared, set(linears), head_path, used)
        hidden = backbone(input_ids=ids.repeat(STREAMS, 1).to(source.device), use_cache=False)[0]
        by_stream = [h.flatten(0, 1)[real.to(h.device)] for h in hidden.chunk(STREAMS)]
        return _compare_logits(compared, by_stream, head_path, shape)


def _place(model: nn.Module, compared: _Compared, linears: set[str], head: str, used: Sequence[int]) -> None:
    """Give a skeleton its small tensors, the used rows of its embedding, and linears that read their weights."""
    source, embedding = compared.source, path_of(model, model.get_input_embeddings())  # type: ignore[operator]
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(source.device)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if owner == head or (owner in linears and leaf == "weight") or not _is_needed(name, compared):
            continue
        value = source.base(compared.source.piece(name))
        if owner == embedding and leaf == "weight":
            value = value[torch.tensor(used, device=value.device)]
            model.get_submodule(owner).padding_idx = None  # type: ignore[assignment]  # of a row that is not there
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value.to(parameter.dtype), requires_grad=False)
    for path in linears:
        bias = model.get_submodule(path).bias
        model.set_submodule(path, _Triple(compared, path, bias if isinstance(bias, Tensor) else None))


def _is_needed(name: str, compared: _Compared) -> bool:
    return name in compared.source.weights.fitted.stored


def _compare_logits(
    compared: _Compared, hidden: Sequence[Tensor], head: str, shape: tuple[float, float | None]
) -> Difference:
    """Compare logits over a part of the vocabulary after the other."""
    factor, softcap = shape
    weight, bias_name = compared.source.piece(f"{head}.weight"), f"{head}.bias"
    base = compared.source.base(weight)
    exact, saved = compared.source.added(weight, base), compared.read_saved(weight)
    bias = compared.source.base(compared.source.piece(bias_name)) if _is_needed(bias_name, compared) else None
    merged = learnt = 0.0
    best = [(h.new_full((len(h),), -torch.inf), h.new_zeros(len(h), dtype=torch.int64)) for h in hidden]
    for start in range(0, weight.shape[0], VOCABULARY_ROWS):
        part = slice(start, start + VOCABULARY_ROWS)
        logits = []
        for i, (h, w) in enumerate(zip(hidden, (base, exact, saved), strict=True)):
            z = F.linear(h, w[part].float(), None if bias is None else bias[part].float()) * factor
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            most, where = z.max(dim=1)
            better = most > best[i][0]
            best[i] = torch.where(better, most, best[i][0]), torch.where(better, where + start, best[i][1])
            logits.append(z)
        learnt = max(learnt, float((logits[1] - logits[0]).abs().max()))
        merged = max(merged, float((logits[2] - logits[1]).abs().max()))
    same = int((best[1][1] == best[2][1]).sum())
    return Difference(merged, learnt, same, len(hidden[0]))
