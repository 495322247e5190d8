"""What a family does between its backbone and its logits, found by running its own forward over a stand-in backbone.

Fields of a config do not tell: one family multiplies by `logits_scaling`, another divides by it, a third has the field
from another model's config and does not read it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

SIZES = (1.0, 10.0, 100.0)  # of the logits of a token each, so that any softcap is seen
TRIED = 8  # logits that the stand-in head computes; it fills the rest of the vocabulary with zeros


def find_logit_shape(model: PreTrainedModel, head: str, config: PretrainedConfig) -> tuple[float, float | None] | None:
    """Return (factor on the logits, softcap) of a causal LM, a skeleton or not; None where its forward does something
    else between hidden states and logits.

    head: path of its head, a linear. config: of its text model."""
    found = _tried(model, head)
    if found is None:
        return None
    plain, logits = found
    for factor, softcap in _named(config):
        expected = plain * factor
        if softcap is not None:
            expected = torch.tanh(expected / softcap) * softcap
        if logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
            return factor, softcap
    return None


def _named(config: PretrainedConfig) -> Iterator[tuple[float, float | None]]:
    """Yield the factors and softcaps that fields of a config can mean, those without effect first."""

    def values(*fields: str) -> list[float]:
        found = [getattr(config, field, None) for field in fields]
        return [float(value) for value in found if isinstance(value, int | float) and value]

    for softcap in (None, *values("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")):
        for factor in (1.0, *values("logit_scale", "logits_scaling"), *(1.0 / v for v in values("logits_scaling"))):
            yield factor, softcap


def _tried(model: PreTrainedModel, path: str) -> tuple[Tensor, Tensor] | None:
    """Return (what the head alone makes of random hidden states, the model's logits of them), both [S, V]; None where
    its forward does not run, or reads weights beside the head's."""
    head = model.get_submodule(path)
    assert isinstance(head, nn.Linear)
    draw = torch.Generator().manual_seed(0)
    hidden_1SH = torch.randn(1, len(SIZES), head.in_features, generator=draw) * torch.tensor(SIZES)[None, :, None]
    stand_in = _Head(head.in_features, head.out_features, draw)
    logits = None
    # A forward that wants more than tokens, or multiplies numbers with a skeleton's weights, ends in any of these.
    failures = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)
    with suppress(*failures), torch.no_grad(), _stand_ins(model, hidden_1SH, path, stand_in):
        logits = model(input_ids=torch.zeros(1, len(SIZES), dtype=torch.int64), return_dict=True).logits
    if not isinstance(logits, Tensor) or logits.is_meta:
        return None
    return stand_in(hidden_1SH)[0], logits[0].float()


@contextmanager
def _stand_ins(model: PreTrainedModel, hidden_1SH: Tensor, path: str, head: nn.Module) -> Iterator[None]:
    """Let the models inside `model` return hidden states whatever they are given, and `head` be at `path`."""
    own = model.get_submodule(path)
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    outputs = _Outputs((hidden_1SH,))
    try:
        model.set_submodule(path, head)
        for module in inner:
            module.__dict__["forward"] = lambda *args, **kwargs: outputs
        yield
    finally:
        model.set_submodule(path, own)
        for module in inner:
            module.__dict__.pop("forward", None)


class _Outputs(tuple[Tensor, ...]):
    """What any backbone returns: the hidden states, and nothing under other names."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Head(nn.Linear):
    """A head of as many outputs as the model's, of which a few are computed: its weight would be gigabytes."""

    def __init__(self, in_features: int, out_features: int, draw: torch.Generator) -> None:
        super().__init__(in_features, min(TRIED, out_features), bias=False, dtype=torch.float32)
        self.vocabulary = out_features
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=draw) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, self.vocabulary - self.out_features))
