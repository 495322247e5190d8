"""What answering and measuring take of a rank's memory, in bytes: of the base, of each row, of the passes.

V vocabulary.
"""

from dataclasses import dataclass, replace

from fsdp_qlora.generation.cache import KVCache
from fsdp_qlora.generation.decoder import PROMPT_TOKENS, switch_of
from fsdp_qlora.models.causal_lm import LABELS, CausalModel
from fsdp_qlora.models.skeleton import text_config

# Bytes of a row for each token of the vocabulary. GREEDY: of prompts, float32 thrice, as they come, together and with
# rows that have none, and a chunk's in the compute dtype. DRAWN: the filters of `sampling.pick` and the sort in them.
GREEDY, DRAWN = 16, 44


@dataclass(frozen=True)
class Workload:
    """What is to be answered, and measured beside it.

    capacity: tokens of the longest row with its answer. longest: tokens of the longest prompt. count: rows there are,
    of all ranks. asked: rows at a time, -1: as many as pay. draws: tokens are drawn. measured: tokens of a pass that
    measures losses, padding included, 0: none. widest: tokens of the longest row in such a pass."""

    capacity: int
    longest: int
    count: int
    asked: int = -1
    draws: bool = False
    measured: int = 0
    widest: int = 0


@dataclass(frozen=True)
class Needs:
    """Bytes of a rank's device, and of a node's host memory."""

    blocks: list[int]
    other: int  # head and the rest, where they are on the device
    host: int  # an embedding's rows
    row: int
    work: int  # of a pass, and of adapters
    scratch: int  # of work: decoded weights, which a model that trains has anyway


def needs_of(model: CausalModel, work: Workload) -> Needs:
    linears, config = model.linears().values(), text_config(model.backbone.config)
    size, hidden, vocabulary = model.precision.compute.itemsize, config.hidden_size, int(config.vocab_size)
    widest = max(max(linear.out_features, linear.in_features) for linear in linears)
    per_token = (6 * hidden + 4 * widest) * size  # the stream and an MLP's middle
    specs = [block.spec for block in model.fused_blocks]
    longest, switch = work.longest, switch_of(model)
    if switch is not None and longest <= switch < work.capacity:
        longest = switch + 1  # rows that have grown so long go through once more
    if specs:
        row = KVCache.row_bytes(specs, work.capacity, model.precision.compute)
        prompts = per_token * (longest if work.asked == 1 else max(PROMPT_TOKENS, longest))
        measured = per_token * work.measured
    else:  # the keys before and behind a step's are there at once; all rows' prompts go through together
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        row = 3 * config.num_hidden_layers * heads * head_dim * work.capacity * size
        row += longest * (per_token + _scores(model, longest))
        prompts, measured = 0, work.measured * (per_token + _scores(model, work.widest))
    measured += LABELS * vocabulary * (size + 16) if work.measured else 0
    # Decoded: the widest pair of linears that share an input.
    scratch = 2 * max(linear.out_features * linear.in_features for linear in linears) * size
    adapters = sum(p.numel() for linear in linears for p in linear.adapter_parameters().values()) * size * 3 // 2
    on_device = [unit for unit in model.units if unit.home != "host"]
    return Needs(
        blocks=[unit.frozen.layout.nbytes for unit in on_device if unit.name in model.blocks],
        other=sum(unit.frozen.layout.nbytes for unit in on_device if unit.name not in model.blocks),
        host=sum(unit.frozen.layout.nbytes for unit in model.units if unit.home == "host"),
        row=row + (DRAWN if work.draws else GREEDY) * vocabulary,
        work=scratch + adapters + max(prompts, measured),
        scratch=scratch,
    )


def answering_bytes(model: CausalModel, capacity: int, longest: int) -> int:
    """Return what answering one row at a time takes of a device beside a model that trains.

    capacity: tokens of the longest row with its answer. longest: of the longest prompt."""
    needs = needs_of(model, replace(Workload(capacity, longest, 1), asked=1))
    return needs.row + needs.work - (needs.scratch if model.fused_blocks else 0)


def _scores(model: CausalModel, keys: int) -> int:
    """Return the bytes that attention of generic blocks takes for a token over so many keys: masks, or scores."""
    config = text_config(model.backbone.config)
    size = model.precision.compute.itemsize
    if getattr(config, "_attn_implementation", None) == "eager":
        return keys * (int(config.num_attention_heads) * (2 * size + 8) + size)
    return keys * (1 + size)
