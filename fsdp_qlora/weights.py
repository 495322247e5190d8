"""Where a model's weights come from: safetensors in a folder or on the hub, or random numbers of the same shapes."""

import json
import math
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fsdp_qlora.errors import UserError, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READERS = 4  # threads: enough to keep a disk busy; each holds one tensor in memory

Shape = tuple[int, ...] | None  # None: whatever it is, the reader checks it


class Weights(Protocol):
    """A source of tensors by their checkpoint names."""

    def names(self) -> Set[str] | None:
        """Every tensor there is, or None where the source makes whatever is asked for."""

    def check(self, expected: Mapping[str, Shape], ignored: Iterable[str]) -> None:
        """Raise UserError naming every tensor that is missing, extra or of another shape."""

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        """The tensors of those names (with the shapes they have), on the CPU or on `device`, in their own dtypes."""


class Checkpoint:
    """safetensors files of one folder: a single file or a sharded index. Only headers are read until `read`."""

    def __init__(self, folder: Path, workers: int = -1) -> None:
        self.folder = folder
        self.workers = workers if workers > 0 else READERS
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        for file in _files(folder):
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                    self._file_of[name] = file
                    self._shape_of[name] = tuple(tensors.get_slice(name).get_shape())

    def names(self) -> Set[str]:
        return self._file_of.keys()

    def check(self, expected: Mapping[str, Shape], ignored: Iterable[str] = ()) -> None:
        missing = [name for name in expected if name not in self._shape_of]
        extra = sorted(self._shape_of.keys() - expected.keys() - set(ignored))
        wrong = [
            f"{name} is {list(self._shape_of[name])} and should be {list(shape)}"
            for name, shape in expected.items()
            if name in self._shape_of and shape is not None and self._shape_of[name] != tuple(shape)
        ]
        found = [
            f"{what}: {_some(names)}"
            for what, names in (("missing", missing), ("unknown", extra), ("mis-shaped", wrong))
            if names
        ]
        if found:
            raise UserError(
                f"model_name: the tensors in {self.folder} do not fit its config.json; {'; '.join(found)}. "
                "Is the download complete, and is the config of this model?"
            )

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        def one(name: str) -> Tensor:
            with _open(self._file_of[name]) as tensors:
                try:
                    return tensors.get_tensor(name).clone()  # the clone is the read: until then it is a mapped file
                except (SafetensorError, OSError) as error:
                    raise UserError(f"model_name: {name} of {self._file_of[name]} cannot be read ({error})") from error

        with ThreadPoolExecutor(self.workers) as pool:
            return dict(zip(wanted, pool.map(one, wanted), strict=True))


class OnHub:
    """A hub model's checkpoint, downloaded when its tensors are first asked for: by then the run is known to be able.

    Their names alone are had from the files' headers, which the hub gives without the rest."""

    def __init__(self, model_name: str, revision: str | None, workers: int = -1) -> None:
        self.model_name, self.revision, self.workers = model_name, revision, workers
        self._checkpoint: Checkpoint | None = None
        self._names: Set[str] | None = None

    def names(self) -> Set[str]:
        if self._checkpoint is None and self._names is None:
            self._names = names_on_hub(self.model_name, self.revision)
        return self._open().names() if self._names is None else self._names

    def check(self, expected: Mapping[str, Shape], ignored: Iterable[str] = ()) -> None:
        self._open().check(expected, ignored)

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        return self._open().read(wanted, device)

    def _open(self) -> Checkpoint:
        if self._checkpoint is None:
            self._checkpoint = Checkpoint(fetch(self.model_name, self.revision), self.workers)
        return self._checkpoint


class Dummy:
    """Random weights of the right shapes, so that a rig can be tried before anything is downloaded.

    The values depend on the name alone, so every rank and every run makes the same ones on the same kind of device.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def names(self) -> None:
        return None

    def check(self, expected: Mapping[str, Shape], ignored: Iterable[str] = ()) -> None:
        """Nothing can be missing."""

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        return {name: self._make(name, shape, device) for name, shape in wanted.items() if shape is not None}

    def _make(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if len(shape) == 1:  # a norm's weight keeps activations at unit size only where it is about one
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self.dtype, device=device)
        generator = torch.Generator(device).manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
        return torch.randn(shape, dtype=self.dtype, device=device, generator=generator).mul_(1 / math.sqrt(shape[-1]))


def names_on_hub(model_name: str, revision: str | None) -> Set[str] | None:
    """Every tensor of a hub model, read from the headers of its files; None where the hub does not tell (offline)."""
    from huggingface_hub import get_safetensors_metadata

    try:
        return get_safetensors_metadata(model_name, revision=revision).weight_map.keys()
    except Exception:  # whatever it is, the download that follows meets it too, and says it
        return None


def fetch(model_name: str, revision: str | None) -> Path:
    """The folder of the hub's snapshot of a model, downloaded if it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Some models hold their weights a second time in another layout: `consolidated*`, or a folder.
        wanted, unwanted = ["*.safetensors", "*.json"], ["consolidated*", "*/*"]
        return Path(snapshot_download(model_name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model_name: {model_name} is neither a local folder nor a model the hub gives "
            f"({type(error).__name__}: {first_line(error)}); check the name, the network, "
            "and `hf auth login` for a gated model"
        ) from error


def _files(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise UserError(
                f"model_name: {index} is damaged ({type(error).__name__}: {error}); download it again"
            ) from error
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(
                f"model_name: {folder} lacks {_some(absent)}, which its {INDEX} names; download the rest of the model"
            )
        return files
    if single.is_file():
        return [single]
    raise UserError(
        f"model_name: {folder} holds neither {SINGLE} nor {INDEX}; weights are read from safetensors only "
        "(save_pretrained of Hugging Face writes them), or try the machine with --dummy_weights true"
    )


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"model_name: {file} cannot be read ({error}); download it again") from error


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
