"""A model's tensors under GGUF's names, by the tables of the package `gguf`."""

from typing import Any

import gguf
from transformers import PreTrainedModel

from fsdp_qlora.errors import UserError
from fsdp_qlora.export.gguf.families import Family
from fsdp_qlora.models.skeleton import backbone_of, head_of, path_of


class Names:
    """Names in a Hugging Face model -> names in GGUF. `head`: of the head's weight in the model."""

    def __init__(self, model: PreTrainedModel, config: Any, family: Family) -> None:
        self._table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.arch], config.num_hidden_layers)
        self._backbone = path_of(model, backbone_of(model))
        self.head = f"{path_of(model, head_of(model))}.weight"

    def __call__(self, name: str) -> str | None:
        """Return the name in GGUF; None for what is no part of the text model. Raises UserError for an unknown part."""
        if name == self.head:
            return "output.weight"
        if not name.startswith(f"{self._backbone}."):
            return None
        found = self._table.get_name(f"model.{name.removeprefix(f'{self._backbone}.')}", (".weight", ".bias"))
        if found is None:
            raise UserError(f"model_name: {name} has no place in llama.cpp's form of this model")
        return found
