"""An adapter folder, read back: its parameters by linear, and over which base, stored how, they were trained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fsdp_qlora.adapters.base import AdapterKind
from fsdp_qlora.adapters.table import saved_kind, train_type_of
from fsdp_qlora.config.options import AdapterOptions, Config, ModelOptions
from fsdp_qlora.config.parse import parse_record
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.export.peft import ADAPTER, ADAPTER_CONFIG
from fsdp_qlora.models.skeleton import quantization_of, read_config

BASE_COPY = ".base_layer.weight"  # of an adapted head, whose own weight PEFT saves along with its adapter
PLAN = "plan.json"
CONFIG = "config.yaml"  # beside an adapter of train.py: the options of its run


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder whose headers are read.

    linears: path in the Hugging Face model -> parameter -> its tensor's name in the file. run: the options of the run
    that made it, None beside an adapter of another program."""

    folder: Path
    kind: AdapterKind
    options: AdapterOptions
    base_model: str
    revision: str | None
    linears: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, tuple[int, ...]]  # by the tensor's name in the file
    run: Config | None

    def values(self, path: str) -> dict[str, Tensor]:
        """Read the parameters of one linear."""
        with _opened(self.folder / ADAPTER) as tensors:
            return {parameter: tensors.get_tensor(name) for parameter, name in self.linears[path].items()}

    def shapes_of(self, path: str) -> dict[str, tuple[int, ...]]:
        """Return parameter -> shape of one linear's."""
        return {parameter: self.shapes[name] for parameter, name in self.linears[path].items()}

    def was_on_gpu(self) -> bool:
        """Return whether the run beside it, if any, measured a GPU's rates for its plan."""
        try:
            return json.loads((self.folder / PLAN).read_text())["rates"] is not None
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def nbytes(self) -> int:
        return (self.folder / ADAPTER).stat().st_size


def read_adapter(folder: Path) -> SavedAdapter:
    """Return the adapter in `folder`. Raises UserError where there is none, or one that is not known here."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else f"is no folder (the current folder is {Path.cwd()})"
        raise UserError(f"adapter: {folder} {what}; give the output_dir of a finished run")
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER).is_file():
        missing = [name for name in (ADAPTER_CONFIG, ADAPTER) if not (folder / name).is_file()]
        raise UserError(f"adapter: {folder} has no {' and no '.join(missing)}; give the output_dir of a finished run")
    try:
        settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        kind, options = saved_kind(settings)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"adapter: {folder / ADAPTER_CONFIG} is damaged ({first_line(error)})") from error
    with _opened(folder / ADAPTER) as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    linears: dict[str, dict[str, str]] = {}
    for name in shapes:
        if name.endswith(BASE_COPY):
            continue
        found = kind.from_peft_name(name)
        if found is None:
            raise UserError(
                f"adapter: {folder / ADAPTER} holds {name}, which is no parameter of {kind.label}; merge it with PEFT"
            )
        linears.setdefault(found[0], {})[found[1]] = name
    return SavedAdapter(
        folder, kind, options, str(settings.get("base_model_name_or_path") or ""), settings.get("revision"), linears,
        shapes, _run_of(folder),
    )  # fmt: skip


def base_options(
    adapter: SavedAdapter, given: Mapping[str, Any], stored: bool, instead: str = ", or --merge_base original"
) -> ModelOptions:
    """Return the base that an adapter belongs to, as train.py's options name it.

    given: those of model_name, revision, train_type, precision and double_quant that the user named, which say what an
    adapter of another program does not. stored: whether it must be known how the base was stored while it trained.
    instead: what else a user may do where that is not known.
    Raises UserError where that is not known, or is not as given."""
    recorded = adapter.run.model if adapter.run is not None else None
    if recorded is not None and recorded.dummy_weights:
        raise UserError(f"adapter: {adapter.folder} was trained over random weights (dummy_weights): there is no base")
    elsewhere = {name: given[name] for name in ("model_name", "revision") if given.get(name) is not None}
    name = elsewhere.get("model_name") or (recorded.model_name if recorded else adapter.base_model)
    if not name:
        raise UserError(f"model_name: {adapter.folder} does not say what its base is; add --model_name")
    revision = elsewhere.get("revision") or (None if "model_name" in elsewhere else adapter.revision)
    if recorded is None:
        how = ("train_type", "precision")
        missing = [option for option in how if given.get(option) is None]
        named = TRAIN_TYPES.get(given.get("train_type") or "")
        if named is not None and named.is_nf4 and given.get("double_quant") is None:
            missing.append("double_quant")
        if stored and named is not None and named.codec == "hqq" and not _is_published(name, revision):
            raise UserError(
                f"train_type: {adapter.folder} has no {CONFIG}, which alone tells bits and groups of a base in HQQ; "
                f"bring it from the run's output_dir{instead}"
            )
        if missing and stored:
            raise UserError(
                f"{missing[0]}: {adapter.folder} has no {CONFIG}, so how its base was stored in training is not known; "
                f"add {', '.join(f'--{option}' for option in missing)} as it was trained{instead}"
            )
        chosen = {option: given[option] for option in (*how, "double_quant") if given.get(option) is not None}
        if "train_type" in chosen:  # says how the base is stored; the adapter is what it is
            chosen["train_type"] = train_type_of(chosen["train_type"], adapter.kind)
        return ModelOptions(model_name=name, revision=revision, **chosen)
    for option in ("train_type", "precision", "double_quant"):
        was = getattr(recorded, option)
        if given.get(option) is not None and given[option] != was:
            raise UserError(
                f"{option}: {given[option]} is not what {adapter.folder} was trained with ({was}, by its {CONFIG}); "
                f"omit {option}"
            )
    return replace(recorded, model_name=name, revision=revision)


def _is_published(model_name: str, revision: str | None) -> bool:
    """Return whether a base's config.json says how it is quantized, so that no options need to."""
    return quantization_of(read_config(model_name, revision)) is not None


def _run_of(folder: Path) -> Config | None:
    file = folder / CONFIG
    if not file.is_file():
        return None
    try:
        return parse_record(str(file))
    except UserError as error:
        raise UserError(
            f"adapter: {file} is not read ({first_line(error)}); move it away and name --train_type, --precision and "
            "--double_quant as it was trained"
        ) from error


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter: {file} cannot be read ({first_line(error)}); is the download complete?") from error
