"""Files of a checkpoint: those that hold weights, their tensors by name, and folders that hold something else."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fsdp_qlora.errors import UserError
from fsdp_qlora.weights.pickled import QMODEL, HqqFile, PickledFile
from fsdp_qlora.weights.source import StoredTensor

# In transformers' order: the first that exists is read.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of dtypes that hold a weight as it is
WHOLE = "config.json, weights in safetensors and tokenizer"  # what a model's folder has, in messages
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ADAPTER_CONFIG = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_LONGEST = 1024  # bytes of a pointer file
LFS_KINDS = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")


class TensorFile(Protocol):
    """One file of a checkpoint, open."""

    def tensors(self) -> dict[str, StoredTensor]:
        """Return what the file says of every tensor, by name, without reading them."""

    def reader(self) -> Callable[[str], Tensor]:
        """Return what gives tensors by name, for one thread: their numbers are read when they are first used."""


class SafetensorsFile:
    """A .safetensors file, opened for each thread that reads: threads cannot share a handle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tensors(self) -> dict[str, StoredTensor]:
        with self._open() as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: StoredTensor(tuple(s.get_shape()), s.get_dtype() in FLOATS) for name, s in slices.items()}

    def reader(self) -> Callable[[str], Tensor]:
        tensors: Callable[[str], Tensor] = self._open().get_tensor
        return tensors

    def _open(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"model_name: {self.path} cannot be read ({error}); download it again") from error


def open_file(path: Path) -> TensorFile:
    """Open a file of `files_of`."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return HqqFile(path) if path.name == QMODEL else PickledFile(path)


def files_of(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights. Raises UserError if any of them is missing."""
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _listed(folder, index)
    if (folder / QMODEL).is_file():
        return [folder / QMODEL]
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf", ".pth"))
    raise UserError(
        f"model_name: {folder} holds none of {SINGLE}, {INDEX}, {PICKLED}, {PICKLED_INDEX} and {QMODEL}"
        + (f", only {some(others)}" if others else "")
        + "; save_pretrained of transformers writes the first two, or try the machine with --dummy_weights true"
    )


def _listed(folder: Path, index: str) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads((folder / index).read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise UserError(
            f"model_name: {folder / index} is damaged ({type(error).__name__}: {error}); download it again"
        ) from error
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise UserError(
            f"model_name: {folder / index} names files outside its folder ({some(outside)}), which are not read; "
            "download the model again"
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"model_name: {folder} lacks {some(absent)}, which its {index} names; download the rest of the model"
        )
    return [folder / name for name in names]


def check_model_name(model_name: str) -> None:
    """Raise UserError for the name of a file, of a folder that is not there, or of one that holds no model.

    What could be a hub model's name passes."""
    path = Path(model_name)
    if path.is_dir():
        _check_folder(path)
    elif path.is_file():
        what = "a GGUF file, which is not trained over" if path.suffix == ".gguf" else "a file"
        raise UserError(f"model_name: {model_name} is {what}; set model_name to the folder with {WHOLE}")
    elif not HUB_NAME.fullmatch(model_name):
        raise UserError(f"model_name: there is no folder {model_name} (the current folder is {Path.cwd()})")


def _check_folder(folder: Path) -> None:
    """Raise UserError if a folder holds an adapter, git-lfs pointers or no config.json instead of a model."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = _base_of(folder / ADAPTER_CONFIG)
        if (folder / "config.json").is_file():
            raise UserError(
                f"model_name: {folder} holds an adapter ({ADAPTER_CONFIG}) beside a model, and transformers would load "
                "both; move the adapter away to train the model alone, or merge them (`python -m fsdp_qlora merge`)"
            )
        raise UserError(
            f"model_name: {folder} holds an adapter ({ADAPTER_CONFIG}), not a model; set model_name to its base{base}, "
            f"or merge the two: `python -m fsdp_qlora merge --adapter {folder}`"
        )
    pointers = sorted(file.name for file in folder.iterdir() if file.suffix in LFS_KINDS and _is_lfs_pointer(file))
    if pointers:
        raise UserError(
            f"model_name: {some(pointers)} in {folder} {'is a' if len(pointers) == 1 else 'are'} git-lfs "
            f"pointer{'s' * (len(pointers) > 1)}, not the file{'s' * (len(pointers) > 1)}: run `git lfs pull` there, "
            "or download the model with `hf download`"
        )
    if not (folder / "config.json").is_file():
        held = some(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise UserError(
            f"model_name: {folder} has no config.json (it holds {held}); set model_name to the folder with {WHOLE}"
        )


def _base_of(adapter_config: Path) -> str:
    try:
        name = json.loads(adapter_config.read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, OSError):
        return ""
    return f" ({name})" if name else ""


def _is_lfs_pointer(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > LFS_LONGEST:
        return False
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def some(names: list[str], most: int = 8) -> str:
    """Return the first names, and the number of the rest."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
