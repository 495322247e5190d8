"""A base and its adapter as one source of weights, tensor by tensor: never more than a few tensors in memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from fsdp_qlora.config.options import AdapterOptions, ModelOptions
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.export.adapter_folder import SavedAdapter
from fsdp_qlora.models.assemble import Recipe, assemble
from fsdp_qlora.models.fitting import Fitted, fit, has_its_own_head
from fsdp_qlora.models.precision import MODES, Precision
from fsdp_qlora.models.skeleton import build, quantization_of, read_config
from fsdp_qlora.placement.load import check_names, encode_entry, expected_of
from fsdp_qlora.weights.checkpoint_files import some
from fsdp_qlora.weights.choose import as_published, codec_chooser, open_weights, told_forms
from fsdp_qlora.weights.codecs import Codec, Plain, is_quantized, weight_of
from fsdp_qlora.weights.hub import fetch
from fsdp_qlora.weights.layout import Entry

MergeBase = Literal["trained", "original"]


@dataclass(frozen=True)
class Piece:
    """A tensor of a merged model: its names in model and checkpoint, and the linear that is adapted, if any."""

    name: str
    stored: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: a float, in whatever dtype is asked for
    linear: str | None

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.dtype is None else self.dtype


class Merged:
    """The tensors of base + adapter under the checkpoint's names.

    skeleton: the Hugging Face model on the meta device. folder: of the base. pieces: in the checkpoint's order. Without
    an adapter they are the base's as it is published, quantized or not, whatever `options` and `merge_base` say."""

    def __init__(
        self, options: ModelOptions, adapter: SavedAdapter | None, merge_base: MergeBase, device: torch.device
    ) -> None:
        """Read config and headers. Raises UserError where base and adapter do not belong together."""
        self.adapter, self.merge_base, self.device = adapter, merge_base, device
        self.hf_config: PretrainedConfig = read_config(options.model_name, options.revision)
        quantized = quantization_of(self.hf_config)
        if quantized is not None and adapter is not None:
            self._check_original(options)
        self.skeleton: PreTrainedModel = self.build()
        state = self.skeleton.state_dict()
        if adapter is not None:
            check_adapter(adapter, self.skeleton, options.model_name)
            check_head(adapter, self.skeleton)
        self.folder = _folder_of(options)
        local = ModelOptions(model_name=str(self.folder), loading_workers=options.loading_workers)
        weights = fit(self.skeleton, open_weights(local, MODES[options.precision].stream))
        assert isinstance(weights, Fitted)
        self.weights = weights
        names = weights.names()
        published = quantized is not None or any(is_quantized(name, names) for name in names)
        if adapter is None:
            self.merge_base = "trained" if published else "original"
            options = as_published(options, quantized, told_forms(quantized, weights, torch.float32))
        elif published:
            self._check_original(options)
        self.precision: Precision = MODES[options.precision]
        # What CPUs and GPUs do differently where the base's quantized form is made anew, "" where nothing is.
        self.rounded_by = "" if published or self.merge_base != "trained" else _rounded_by(options)
        self.own_head = has_its_own_head(self.skeleton, weights)  # though the config ties it to the embedding
        self._entries, self._computed = self._encoding(options, quantized)
        linears = {f"{path}.weight": path for path in (adapter.linears if adapter is not None else ())}
        pieces: dict[str, Piece] = {}
        for name, stored in weights.fitted.stored.items():
            written = weight_of(stored)
            if name in state and (written not in pieces or name in linears):
                dtype = None if state[name].is_floating_point() else state[name].dtype
                pieces[written] = Piece(name, written, tuple(state[name].shape), dtype, linears.get(name))
        self.pieces = [pieces[written] for written in sorted(pieces, key=dot_natural_key)]

    def _check_original(self, options: ModelOptions) -> None:
        """Raise UserError where the original of a checkpoint is asked for that is published quantized."""
        if self.merge_base == "original":
            raise UserError(
                f"merge_base: original is the unquantized checkpoint, and {options.model_name} is published quantized; "
                "use --merge_base trained, or name the unquantized one as --model_name"
            )

    def say_notes(self) -> None:
        """Print where the base's numbers cannot be those of the training to the last bit."""
        if self.adapter is not None and self.rounded_by and self.adapter.was_on_gpu() and self.device.type == "cpu":
            print(
                f"note      the base was quantized on a GPU and is here on the CPU, which {self.rounded_by}; "
                "start this on a machine with a GPU for the very same numbers",
                flush=True,
            )

    def build(self) -> PreTrainedModel:
        """Return a skeleton of the model that computes in float32, with the attention that every family has."""
        return build(self.hf_config, Precision(torch.float32, torch.float32), "eager")

    def piece(self, name: str) -> Piece:
        """Return the piece of a name in the model, also where it is stored once under a name that it is tied to."""
        found = self._by_name.get(name)
        return found or self._by_stored[weight_of(self.weights.fitted.stored[name])]

    def names(self) -> list[str]:
        """Return the names in the model of all that is stored, in order."""
        stored = self.weights.fitted.stored
        return sorted((name for name in self.skeleton.state_dict() if name in stored), key=dot_natural_key)

    @cached_property
    def _by_name(self) -> Mapping[str, Piece]:
        return {piece.name: piece for piece in self.pieces}

    @cached_property
    def _by_stored(self) -> Mapping[str, Piece]:
        return {piece.stored: piece for piece in self.pieces}

    def read(self, piece: Piece) -> dict[str, Tensor]:
        """Return the checkpoint's tensors of a piece, for `base`: to be read ahead. An encoding is not: its
        parts would lie beside what is summed."""
        with reading(self.folder):
            return self.weights.read(expected_of(piece.name, piece.shape, self.weights), self.device)

    def base(self, piece: Piece, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Return a tensor of the base: of `trained`, the very numbers that training computed with; of `original`, the
        checkpoint's. tensors: of `read`, which are let go."""
        entry = self._entries.get(piece.name) if self.merge_base == "trained" else None
        tensors = self.read(piece) if tensors is None else tensors
        if entry is None:
            return tensors[piece.name].to(self.device)
        parts = encode_entry(entry, piece.name, tensors, self.device)
        tensors.clear()
        computed = piece.name in self._computed
        return entry.codec.decode(parts, entry.shape, self.precision.compute if computed else self.precision.stream)

    def added(self, piece: Piece, base: Tensor) -> Tensor:
        """Return base + adapter in float32, unrounded; the base itself where the piece has no adapter."""
        if piece.linear is None or self.adapter is None:
            return base
        return self.adapter.kind.merged(base, self.adapter.values(piece.linear), self.adapter.options)

    def _encoding(
        self, options: ModelOptions, quantized: dict[str, object] | None
    ) -> tuple[dict[str, Entry], frozenset[str]]:
        """Return name -> how a run with these options stores it, and the names that it decodes to the compute dtype.

        Raises UserError for a checkpoint that is not the model's, or that such a run does not take."""
        precision = self.precision
        told = told_forms(quantized, self.weights, precision.compute)
        codec_of = codec_chooser(options, quantized, self.weights, precision.compute, told)
        if self.merge_base == "original":
            plain: Codec = Plain(precision.compute)
            codec_of = lambda name: plain  # noqa: E731
        recipe = Recipe(
            precision,
            codec_of,
            remat=None,
            shards=1,
            own_head=self.own_head,
            is_quantized=lambda name: is_quantized(name, self.weights.names()),
            buffers=True,
        )
        model, _ = assemble(self.build(), recipe, AdapterOptions())
        check_names(model, self.weights)
        entries = {
            name: unit.frozen.layout.entries[entry] for unit in model.units for entry, name in unit.sources.items()
        }
        return entries, frozenset(f"{path}.{leaf}" for path in model.linear_paths for leaf in ("weight", "bias"))


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Tell of a disk that does not give what is in `folder` as such, and not as one that cannot be written."""
    try:
        yield
    except OSError as error:
        raise TrainingStopped(
            f"model_name: {error.filename or folder} cannot be read any more ({error.strerror or error}); see to that "
            "disk and start the same command again"
        ) from error


def _rounded_by(options: ModelOptions) -> str:
    codec = TRAIN_TYPES[options.train_type].codec
    if codec == "nf4" and options.double_quant:
        return "rounds a few scales of double quantization to the next code"
    if codec == "hqq" and options.hqq_optimize:
        return "fits HQQ's zeros in float32 and not in float16"
    return ""


def _folder_of(options: ModelOptions) -> Path:
    local = Path(options.model_name)
    return local if local.is_dir() else fetch(options.model_name, options.revision)


def check_adapter(adapter: SavedAdapter, model: PreTrainedModel, base: str) -> None:
    """Raise UserError for an adapter of another model: of linears that `base` lacks, or of other sizes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    absent = [path for path in adapter.linears if f"{path}.weight" not in shapes]
    if absent:
        raise UserError(f"adapter: {adapter.folder} is of another model than {base}, which has no {some(absent)}")
    wrong: Sequence[str] = []
    for path in adapter.linears:
        rows, width = shapes[f"{path}.weight"][0], shapes[f"{path}.weight"][-1]
        wanted = adapter.kind.parameters(rows, width, adapter.options)
        found = adapter.shapes_of(path)
        if found != wanted:
            wrong = [*wrong, f"{path} of {found} where {wanted} belong"]
    if wrong:
        raise UserError(f"adapter: {adapter.folder} is of another model than {base}: {some(list(wrong), 1)}")


def check_head(adapter: SavedAdapter, model: PreTrainedModel) -> None:
    """Raise UserError for an adapter of a tied matrix: merged, it would change both uses."""
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    shared = [path for path in adapter.linears if f"{path}.weight" in tied]
    if shared:
        raise UserError(
            f"adapter: {adapter.folder} adapts {some(shared)}, whose matrix is also the embedding (tied): merged, it "
            "would change both"
        )
