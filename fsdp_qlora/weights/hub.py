"""A hub model's checkpoint as a source of weights."""

import json
from collections.abc import Iterable, Mapping, Set
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.runtime.background import beside
from fsdp_qlora.weights.checkpoint import Checkpoint
from fsdp_qlora.weights.checkpoint_files import PICKLED_INDEX
from fsdp_qlora.weights.pickled import QMODEL
from fsdp_qlora.weights.source import Shape


class OnHub:
    """A hub model's checkpoint, downloaded when its tensors are first asked for: by then the run is known to fit.

    Their names alone come from the files' headers, which the hub gives without the rest."""

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

    def content(self) -> str:
        return self._open().content()

    def sample(self) -> str:
        return self._open().sample()

    def name_in_files(self, name: str) -> str:
        return name

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        return self._checkpoint is not None and self._checkpoint.equal(one, other, dtype)

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        return self._open().read(wanted, device)

    def _open(self) -> Checkpoint:
        if self._checkpoint is None:
            self._checkpoint = Checkpoint(fetch(self.model_name, self.revision), self.workers)
        return self._checkpoint


def names_on_hub(model_name: str, revision: str | None) -> Set[str] | None:
    """Return the names of a hub model's tensors, from its files' headers or index; None if the hub does not tell."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        return get_safetensors_metadata(model_name, revision=revision).weight_map.keys()
    except Exception:  # the download that follows fails alike, with a message
        pass
    try:
        index = hf_hub_download(model_name, PICKLED_INDEX, revision=revision)
        names: Set[str] = json.loads(Path(index).read_text())["weight_map"].keys()
        return names
    except Exception:
        return None


def fetch(model_name: str, revision: str | None) -> Path:
    """Return the folder of the hub's snapshot of a model, downloaded if it is not in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        # Some models hold their weights a second time in another layout: `consolidated*`, or a folder.
        unwanted = ["consolidated*", "*/*"]
        job = partial(
            snapshot_download, model_name, revision=revision, allow_patterns=list(patterns), ignore_patterns=unwanted
        )
        # On a thread that nothing waits for: by itself the hub's client ends at Ctrl-C once the files that its threads
        # have begun are there, which may take an hour.
        return Path(beside(job, torch.device("cpu")).result())

    try:
        folder = download("*.safetensors", "*.json")
        # Pickled files only if there are no safetensors.
        return folder if any(folder.glob("*.safetensors")) else download("pytorch_model*.bin", QMODEL, "*.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model_name: {model_name} is neither a local folder nor a model the hub gives "
            f"({type(error).__name__}: {first_line(error)}); check the name, the network, "
            "and `hf auth login` for a gated model"
        ) from error
