"""A checkpoint fitted to a model of transformers: its tensors under the model's names, and what is left over.

transformers renames tensors while it loads them: from the names of older versions or of a family's own code, with and
without the base model's prefix. Its own rules are asked, name by name, so that what it opens is opened here.
"""

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from fsdp_qlora.errors import UserError
from fsdp_qlora.models.skeleton import LINEARS, backbone_of, head_of, is_wrapper, path_of
from fsdp_qlora.weights.checkpoint_files import some
from fsdp_qlora.weights.codecs import companions, companions_in, weight_of
from fsdp_qlora.weights.source import Shape, Weights

ROTARY = re.compile(r"rotary_emb\.inv_freq$")  # tables that old checkpoints carry


@dataclass(frozen=True)
class Names:
    """A checkpoint's tensors for one model.

    stored: name in the model -> name in the checkpoint. converted: names in the model that transformers computes from
    tensors of another form. unknown: names in the checkpoint that the model has no use for.
    """

    stored: dict[str, str]
    converted: frozenset[str]
    unknown: tuple[str, ...]


def map_names(model: PreTrainedModel, names: Set[str]) -> Names:
    """Apply transformers' renaming for `model`, a skeleton, to the names of a checkpoint."""
    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    belongs = companions_in(names)
    stored, converted, unknown = {}, set(), []
    for name in sorted(names, key=dot_natural_key):
        weight, i = belongs.get(name, (weight_of(name), None))
        renamed, converter = rename_source_key(weight, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and weight in state:
            renamed, converter = rename_source_key(weight, [], [], model.base_model_prefix, state)
        if converter is not None:
            converted.add(renamed)
        elif renamed in state:
            stored[renamed if i is None else companions(renamed)[i]] = name
        else:
            unknown.append(name)
    return Names(stored, frozenset(converted), tuple(unknown))


class Fitted:
    """A source of weights under the names that a model has for them. `names` maps those to the source's."""

    def __init__(self, source: Weights, names: Names) -> None:
        self.source, self.fitted = source, names

    def names(self) -> Set[str]:
        return self.fitted.stored.keys()

    def check(self, expected: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
        converted = [name for name in expected if name in self.fitted.converted]
        if converted:
            raise UserError(
                f"model_name: the checkpoint stores {some(converted)} in another form, which transformers converts "
                "while it loads; this family is not supported"
            )
        self.source.check({self._stored(n): shape for n, shape in expected.items()}, (*unknown, *self.fitted.unknown))

    def content(self) -> str | None:
        return self.source.content()

    def sample(self) -> str | None:
        return self.source.sample()

    def name_in_files(self, name: str) -> str:
        return self.source.name_in_files(self._stored(name))

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        return self.source.equal(self._stored(one), self._stored(other), dtype)

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        found = self.source.read({self._stored(name): shape for name, shape in wanted.items()}, device)
        return {name: found[self._stored(name)] for name in wanted}

    def _stored(self, name: str) -> str:
        return self.fitted.stored.get(name, name)


def fit(model: PreTrainedModel, weights: Weights) -> Weights:
    """Return `weights` under the names of `model`, a skeleton. Raises UserError where the config denies a tensor.

    An embedding that is only there as the head that it is tied to is taken from that."""
    names = weights.names()
    if names is None:  # made up under any name
        return weights
    found = map_names(model, names)
    _check_denied(model, found.unknown)
    stored = dict(found.stored)
    for target, source in _tied(model).items():
        for one, other in ((source, target), (target, source)):
            if one not in stored and other in stored:
                pairs = zip((one, *companions(one)), (other, *companions(other)), strict=True)
                stored |= {name: stored[copied] for name, copied in pairs if copied in stored}
    return Fitted(weights, replace(found, stored=stored))


def has_its_own_head(model: PreTrainedModel, weights: Weights) -> bool:
    """Return whether the checkpoint's head differs from the embedding to which the config ties it.

    transformers then reads both. So do we, and where they cannot be compared before a download: the same numbers twice
    train the same."""
    head = f"{path_of(model, head_of(model))}.weight"
    embedding = _tied(model).get(head)
    if embedding is None or not isinstance(weights, Fitted):
        return False
    stored = weights.fitted.stored
    if head not in stored or embedding not in stored or stored[head] == stored[embedding]:
        return False
    return not weights.equal(head, embedding, model.dtype)


def left_over(model: PreTrainedModel, weights: Weights, untied: bool) -> list[str]:
    """Return lines for the user on what of the checkpoint is read otherwise than its config says, or not at all."""
    lines = []
    odd = sorted({type(module).__name__ for module in model.modules() if type(module).__name__ in LINEARS})
    if odd:
        lines.append(
            f"note      {', '.join(odd)} stays unquantized, as in transformers, unless the checkpoint has it in 4 bits"
        )
    if not isinstance(weights, Fitted):
        return lines
    if untied:
        lines.append(
            "note      the checkpoint has a head of its own though its config ties it to the embedding: it is read"
        )
    unknown = [name for name in weights.fitted.unknown if not ROTARY.search(name)]
    if unknown:
        lines.append(
            f"note      not read, as by transformers: {some(unknown)}, which {type(model).__name__} does not have"
        )
    if is_wrapper(model.config):
        text = (f"{path_of(model, backbone_of(model))}.", f"{path_of(model, head_of(model))}.")
        others = [name for name in weights.fitted.stored if not name.startswith(text)]
        lines.append(
            f"note      only the text part of {type(model).__name__} trains: {len(others)} other tensors are not read"
        )
    return lines


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Return tied parameter -> that which it is tied to, by transformers' own account."""
    return dict(model.all_tied_weights_keys)


def _check_denied(model: PreTrainedModel, unknown: Iterable[str]) -> None:
    """Raise UserError for a weight or bias of a module that the model has without it: of another model's config."""
    expected = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    modules = dict(model.named_modules())
    denied = []
    for name in unknown:
        owner, _, leaf = name.rpartition(".")
        owner = next((path for path in (owner, f"{model.base_model_prefix}.{owner}") if path in modules), "")
        module = modules.get(owner, nn.Identity())
        if leaf in ("weight", "bias") and module._parameters and not any(p.search(name) for p in expected):
            denied.append(name)
    if denied:
        raise UserError(
            f"model_name: the checkpoint has {some(denied)}, of which its config.json knows nothing (transformers "
            "would leave them out); is the config of this model?"
        )
