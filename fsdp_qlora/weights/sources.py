"""Sources of a model's weights: files in a folder or on the hub, or random numbers of the same shapes."""

import json
import math
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.weights.checkpoint_files import PICKLED_INDEX, TensorFile, files_of, open_file, some

READERS = 4  # threads: enough to keep a disk busy; each holds one tensor in memory
ROWS_COMPARED = 4096  # of an embedding and a head at a time

Shape = tuple[int, ...] | None  # None: the reader checks it


class Weights(Protocol):
    """A source of tensors by their checkpoint names."""

    def names(self) -> Set[str] | None:
        """Every tensor there is, or None where the source makes whatever is asked for."""

    def check(self, expected: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
        """Raise UserError naming every tensor that is missing or of another shape, and with them the unknown ones."""

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        """Return whether two tensors are known to have the same numbers in `dtype`, without a download."""

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        """The tensors of those names (with the shapes they have), on the CPU or on `device`, in their own dtypes."""


class Checkpoint:
    """Weight files of one folder. Only headers are read until `read`."""

    def __init__(self, folder: Path, workers: int = -1) -> None:
        self.folder = folder
        self.workers = workers if workers > 0 else READERS
        self._file_of: dict[str, TensorFile] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        for file in map(open_file, files_of(folder)):
            shapes = file.shapes()
            self._shape_of |= shapes
            self._file_of |= dict.fromkeys(shapes, file)

    def names(self) -> Set[str]:
        return self._file_of.keys()

    def check(self, expected: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
        missing = [name for name in expected if name not in self._shape_of]
        wrong = [
            f"{name} is {list(self._shape_of[name])} and should be {list(shape)}"
            for name, shape in expected.items()
            if name in self._shape_of and shape is not None and self._shape_of[name] != tuple(shape)
        ]
        if missing or wrong:
            kinds = (("missing", missing), ("unknown", sorted(unknown)), ("mis-shaped", wrong))
            raise UserError(
                f"model_name: the tensors in {self.folder} do not fit its config.json; "
                f"{'; '.join(f'{kind}: {some(names)}' for kind, names in kinds if names)}. "
                "Is the download complete, and is the config of this model?"
            )

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        if self._shape_of[one] != self._shape_of[other]:
            return False
        first, second = (self._file_of[name].tensor(name) for name in (one, other))
        rows = zip(first.split(ROWS_COMPARED), second.split(ROWS_COMPARED), strict=True)
        return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in rows)

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        def one(name: str) -> Tensor:
            try:
                return self._file_of[name].tensor(name).clone()  # the clone is the read: until then it is a mapped file
            except (SafetensorError, OSError) as error:
                raise UserError(f"model_name: {name} in {self.folder} cannot be read ({error})") from error

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

    def check(self, expected: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
        self._open().check(expected, unknown)

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        return self._checkpoint is not None and self._checkpoint.equal(one, other, dtype)

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

    def check(self, expected: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
        """Nothing can be missing."""

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        return False

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        return {name: self._make(name, shape, device) for name, shape in wanted.items() if shape is not None}

    def _make(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if len(shape) == 1:  # a norm's weight keeps activations at unit size only where it is about one
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self.dtype, device=device)
        generator = torch.Generator(device).manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
        return torch.randn(shape, dtype=self.dtype, device=device, generator=generator).mul_(1 / math.sqrt(shape[-1]))


def names_on_hub(model_name: str, revision: str | None) -> Set[str] | None:
    """Every tensor of a hub model, from the headers or the index of its files; None where the hub does not tell."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        return get_safetensors_metadata(model_name, revision=revision).weight_map.keys()
    except Exception:  # whatever it is, the download that follows meets it too, and says it
        pass
    try:
        index = hf_hub_download(model_name, PICKLED_INDEX, revision=revision)
        names: Set[str] = json.loads(Path(index).read_text())["weight_map"].keys()
        return names
    except Exception:
        return None


def fetch(model_name: str, revision: str | None) -> Path:
    """The folder of the hub's snapshot of a model, downloaded if it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        # Some models hold their weights a second time in another layout: `consolidated*`, or a folder.
        unwanted = ["consolidated*", "*/*"]
        return Path(
            snapshot_download(model_name, revision=revision, allow_patterns=list(patterns), ignore_patterns=unwanted)
        )

    try:
        folder = download("*.safetensors", "*.json")
        # Only where there is nothing better.
        return folder if any(folder.glob("*.safetensors")) else download("pytorch_model*.bin", "*.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model_name: {model_name} is neither a local folder nor a model the hub gives "
            f"({type(error).__name__}: {first_line(error)}); check the name, the network, "
            "and `hf auth login` for a gated model"
        ) from error
