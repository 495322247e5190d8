"""Files of `torch.save` as files of tensors by name: pytorch_model.bin, and the qmodel.pt of hqq's `save_quantized`."""

import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.weights.source import StoredTensor

QMODEL = "qmodel.pt"
MOST = torch.iinfo(torch.int64).max


class _Unpickled(ABC):
    """A file that is unpickled once, when it is first asked for its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Tensor] | None = None

    def tensors(self) -> dict[str, StoredTensor]:
        return {
            name: StoredTensor(tuple(tensor.shape), tensor.is_floating_point() and tensor.itemsize > 1)
            for name, tensor in self._open().items()
        }

    def reader(self) -> Callable[[str], Tensor]:
        return self._open().__getitem__

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is None:
            self._tensors = self._unpickle()
        return self._tensors

    @abstractmethod
    def _unpickle(self) -> dict[str, Tensor]:
        """Return its tensors by name. Raises UserError where it holds something else."""


class PickledFile(_Unpickled):
    """A PyTorch .bin file, mapped and unpickled as tensors alone. Files from before PyTorch 1.6 are read whole."""

    def _unpickle(self) -> dict[str, Tensor]:
        found = unpickled(self.path)
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise UserError(
                f"model_name: {self.path} is no table of tensors by name; save the model with save_pretrained of "
                "transformers"
            )
        return found


def unpickled(path: Path) -> Any:
    """Return what is in a file of `torch.save`, tensors mapped. Raises UserError where other objects are in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model_name: {path} holds Python objects beside tensors ({first_line(error)}); they are not run here: "
            "save the model anew with save_pretrained of transformers, which writes safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"model_name: {path} cannot be read ({first_line(error)}); download it again") from error


class HqqFile(_Unpickled):
    """Modules by name, each with its tensors and, of a quantized linear, hqq's settings as Python values."""

    def _unpickle(self) -> dict[str, Tensor]:
        found = unpickled(self.path)
        if not isinstance(found, dict) or not all(isinstance(module, dict) for module in found.values()):
            raise UserError(f"model_name: {self.path} is no table of modules as hqq saves it; download it again")
        return {name: t for module, state in found.items() for name, t in _flat(module, state).items()}


def _flat(module: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    settings = state.get("meta")  # in a table of their own until hqq 0.2
    values = {**state, **settings} if isinstance(settings, dict) else state
    tensors = {f"{module}.{name}": _as_tensor(value) for name, value in values.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _as_tensor(value: Any) -> Tensor | None:
    """Return a value as hqq writes it into safetensors, None for one that is not read from there."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, str):
        return torch.tensor(list(value.encode(errors="replace")), dtype=torch.uint8)
    if isinstance(value, bool | float | torch.Size) or (isinstance(value, int) and abs(value) <= MOST):
        return torch.tensor(value)
    return None
