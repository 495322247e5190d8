"""Kinds of decoder layers that a config names (`layer_types`), and whether the model's own loop has them."""

import torch
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.errors import UserError

USUAL = {"full_attention", "sliding_attention"}  # a family that reads the field has both


def check_kinds(model_type: str, backbone: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Raise UserError for a kind of layer that the family has no mask for: its forward would end in a KeyError.

    backbone, layers: of a skeleton, whose buffers are real. A family that does not read `layer_types` has any."""
    kinds = getattr(backbone.config, "layer_types", None) or ()
    unusual = sorted(set(kinds) - USUAL)
    missing = _missing(backbone, layers) if unusual else None
    if missing in unusual:
        raise UserError(
            f"model_name: the config.json has a layer of layer_types {missing}, which a {model_type} model does not "
            f"have; set it to one of {', '.join(sorted(USUAL))}, or use a newer transformers"
        )


def _missing(backbone: PreTrainedModel, layers: nn.ModuleList) -> object:
    """Return the key that a forward over two tokens does not find, None if it finds all: layers pass on their input."""
    hidden = torch.zeros(1, 2, backbone.config.hidden_size)
    for layer in layers:
        layer.__dict__["forward"] = _pass_on
    try:
        with torch.no_grad():
            backbone(inputs_embeds=hidden, use_cache=False)
    except KeyError as error:
        return error.args[0]
    except Exception:  # what else ends it, the last norm's weight on the meta device, comes after the layers
        return None
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
    return None


def _pass_on(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return hidden
