"""A model's logits of the next token of several rows: once for their prompts, then token by token.

B rows, S tokens of a prompt, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PretrainedConfig

from fsdp_qlora.generation.cache import KVCache
from fsdp_qlora.generation.cached_block import CachedBlock, CurrentPass
from fsdp_qlora.kernels.segments import segments_of
from fsdp_qlora.models.causal_lm import CausalModel

PROMPT_TOKENS = 8192  # of a pass over prompts: enough to keep a GPU busy, and few enough for its activations
MOVING_TABLES = ("dynamic", "longrope")  # kinds of rotary positions whose tables change with the longest row


class Decoder(Protocol):
    """Rows of a model. All ranks call its methods as often where `is_joint`."""

    rows: int
    capacity: int  # tokens of a row, new ones included

    @property
    def is_joint(self) -> bool:
        """Whether ranks bring each other the blocks, so that all must run as many passes."""

    @property
    def can_capture(self) -> bool:
        """Whether a CUDA graph of a step serves all steps."""

    @property
    def switch(self) -> int | None:
        """The longest row's tokens beyond which all keys are turned otherwise (`switch_of`), None: there are none."""

    def passes(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return the passes that `prefill` makes of these prompts."""

    def prefill(self, prompts: Sequence[Sequence[int]], passes: int) -> Tensor:
        """Begin rows anew with these prompts, at most B; return float32 [B, V], rows beyond them anything.

        passes: to make, at least as many as are needed."""

    def step(self, tokens_B: Tensor) -> Tensor:
        """Add a token to each row; return float32 [B, V]."""

    def forget_adapters(self) -> None:
        """Read the adapters' values anew: they have changed. Captured steps are of no use then."""


class FusedDecoder:
    """Blocks of known families over keys and values in place (`cached_block.py`). Prompts lie one after the other, so
    nothing is padded."""

    def __init__(self, model: CausalModel, rows: int, capacity: int, device: torch.device) -> None:
        self.model, self.rows, self.capacity, self.device = model, rows, capacity, device
        fused = model.fused_blocks
        scratch = fused[0].shared.weights
        self.cache = KVCache([block.spec for block in fused], rows, capacity, scratch.dtype, device)
        self.now = CurrentPass(self.cache)
        self.blocks = [CachedBlock(one.spec, scratch, one.backend, i, self.now) for i, one in enumerate(fused)]
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self._first_places_B = torch.arange(rows, device=device) * capacity

    @property
    def is_joint(self) -> bool:
        return isinstance(self.model, FSDPModule)

    @property
    def can_capture(self) -> bool:
        stays = all(unit.frozen.acquire is None for unit in self.model.units)
        return self.device.type == "cuda" and stays and not self.is_joint and not has_moving_tables(self.model)

    @property
    def switch(self) -> int | None:
        return switch_of(self.model)

    def passes(self, prompts: Sequence[Sequence[int]]) -> int:
        return len(_chunks(prompts))

    def prefill(self, prompts: Sequence[Sequence[int]], passes: int) -> Tensor:
        logits = list[Tensor]()
        first = 0
        self.lengths_B.fill_(1)  # of rows without a prompt: their tokens are thrown away
        with self._one_table(max(map(len, prompts), default=1)):
            for chunk in _chunks(prompts):
                logits.append(self._prompt_pass(chunk, first))
                first += len(chunk)
            for _ in range(passes - len(logits)):
                self._prompt_pass([[0]], None)
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
        self.lengths_B[: len(prompts)] = lengths.to(self.device)
        found = torch.cat(logits) if logits else self.lengths_B.new_zeros((0, 1), dtype=torch.float32)
        return torch.nn.functional.pad(found, (0, 0, 0, self.rows - len(prompts)))

    def step(self, tokens_B: Tensor) -> Tensor:
        now, lengths = self.now, self.lengths_B
        now.segments, now.places, now.seen = None, self._first_places_B + lengths, lengths + 1
        logits = self._run(tokens_B[None], None, lengths[None])
        lengths += 1
        return logits

    def _prompt_pass(self, prompts: Sequence[Sequence[int]], first: int | None) -> Tensor:
        """Return the logits behind each prompt. first: the row of the first; None: nothing is kept."""
        segments = segments_of([len(prompt) for prompt in prompts])
        ids = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
        ends = torch.tensor([piece.stop - 1 for piece in segments.documents])
        lengths = torch.tensor(segments.lengths)
        rows = torch.arange(len(prompts)).repeat_interleave(lengths) + (first or 0)
        places = rows * self.capacity + segments.positions[0]
        self.now.segments = segments.to(self.device)
        self.now.places = None if first is None else places.to(self.device)
        return self._run(ids[None].to(self.device), ends.to(self.device), self.now.segments.positions)

    @contextmanager
    def _one_table(self, longest: int) -> Iterator[None]:
        """Let the passes inside turn keys by the tables of the batch's longest row, as its steps will."""
        current = self.model.current
        current.reach = longest if has_moving_tables(self.model) else None
        try:
            yield
        finally:
            current.reach = None

    def _run(self, ids: Tensor, places: Tensor | None, positions: Tensor) -> Tensor:
        with self.model.computing_by(self.blocks):
            return self.model.logits(ids, places, position_ids=positions)

    def keep_copies(self, most_bytes: int) -> int:
        """Keep decoded copies of weights that lie on the device for good, as many as `most_bytes` allow; return how
        many bytes they take."""
        taken = 0
        for block, cached in zip(self.model.blocks.values(), self.blocks, strict=True):
            if block.frozen.acquire is not None or self.is_joint:
                continue
            for linears in cached.linears:
                if linears.copy_bytes and taken + linears.copy_bytes <= most_bytes:
                    linears.decode()
                    taken += linears.copy_bytes
        return taken

    def forget_adapters(self) -> None:
        """Read the adapters' values anew: they have changed."""
        for block in self.blocks:
            for linears in block.linears:
                linears.forget_adapters()


class GenericDecoder:
    """Transformers' own layers and cache, for families without a fused block. Prompts are padded on the left."""

    def __init__(self, model: CausalModel, rows: int, capacity: int, device: torch.device) -> None:
        self.model, self.rows, self.capacity, self.device = model, rows, capacity, device
        parameters = inspect.signature(model.backbone.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # newer and older transformers
        self._takes_positions = "position_ids" in parameters
        self._given: dict[str, Any] = {}

    @property
    def is_joint(self) -> bool:
        return isinstance(self.model, FSDPModule)

    @property
    def can_capture(self) -> bool:
        return False

    @property
    def switch(self) -> int | None:
        return switch_of(self.model)

    def passes(self, prompts: Sequence[Sequence[int]]) -> int:
        return 1

    def prefill(self, prompts: Sequence[Sequence[int]], passes: int) -> Tensor:
        given = [*prompts, *([[0]] * (self.rows - len(prompts)))]
        longest = max(map(len, given))
        ids = torch.zeros(self.rows, longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(given):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        self._mask = mask.to(self.device)
        self._given = {self._cache_name: DynamicCache(config=self.model.backbone.config)}
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ends = torch.arange(1, self.rows + 1) * longest - 1
        self._lengths_B = mask.sum(1).to(self.device)
        return self._run(ids.to(self.device), ends.to(self.device), positions.to(self.device))

    def forget_adapters(self) -> None:
        """Nothing of them is kept."""

    def step(self, tokens_B: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(self.rows, 1)], dim=1)
        logits = self._run(tokens_B[:, None], None, self._lengths_B[:, None])
        self._lengths_B += 1
        return logits

    def _run(self, ids: Tensor, places: Tensor | None, positions: Tensor) -> Tensor:
        given = {"position_ids": positions} if self._takes_positions else {}
        return self.model.logits(ids, places, attention_mask=self._mask, use_cache=True, **given, **self._given)


def make_decoder(model: CausalModel, rows: int, capacity: int, device: torch.device) -> FusedDecoder | GenericDecoder:
    """Return the decoder for a model. rows: at a time. capacity: tokens of the longest row with its answer."""
    kind = FusedDecoder if model.fused_blocks else GenericDecoder
    return kind(model, rows, capacity, device)


def has_moving_tables(model: CausalModel) -> bool:
    """Return whether the rotary tables change with the longest row, which the host must look at."""
    return any(kind.get("rope_type", "default") in MOVING_TABLES for kind in _ropes(model.backbone.config))


def switch_of(model: CausalModel) -> int | None:
    """Return the tokens of a row beyond which `longrope` has its other table, None: it has none.

    Keys that were kept before do not go with queries of the other table: a row that grows beyond begins anew."""
    config: PretrainedConfig = model.backbone.config
    said = getattr(config, "original_max_position_embeddings", None)
    ends = [kind.get("original_max_position_embeddings") or said for kind in _ropes(config)
            if kind.get("rope_type") == "longrope"]  # fmt: skip
    return min((int(end) for end in ends if end), default=None)


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary parameters of each kind of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]


def _chunks(prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Return prompts as they go through the model together, at least one at a time."""
    chunks, tokens = list[list[Sequence[int]]](), 0
    for prompt in prompts:
        if not chunks or tokens + len(prompt) > PROMPT_TOKENS:
            chunks.append([])
            tokens = 0
        chunks[-1].append(prompt)
        tokens += len(prompt)
    return chunks
