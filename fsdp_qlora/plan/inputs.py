"""What the plan needs to know of a model and a run, as plain numbers: no tensor, no device, kept beside measurements.

`facts_of` reads them off a model that is assembled on the meta device; everything after it is arithmetic on `Facts`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.kernels.attention_on_meta import keys_seen

if TYPE_CHECKING:
    from fsdp_qlora.config.options import Config
    from fsdp_qlora.data.row_lengths import RowLengths
    from fsdp_qlora.distributed.world import World
    from fsdp_qlora.models.causal_lm import CausalModel
    from fsdp_qlora.models.fused.fuse import Fusion

KEEP = tuple(level.label for level in Keep)
FLOAT = 4  # bytes of float32
LINE = 64  # numbers: rows that a fused block makes begin on whole cache lines (`kernels/lora_wide.py`, PITCH)
# Attention's backends by the memory that they take, least first; "": Hugging Face's own, of generic blocks.
ATTENTION = ("", "cudnn", "flash", "flash_attn", "cpu", "math")
RANK_ALIGN = 8  # numbers: the adapters' columns beside an input (`kernels/lora_wide.py`, ALIGN)


@dataclass(frozen=True)
class Facts:
    """A model, a run and how its blocks compute. Sizes in numbers where no unit is named, `_bytes` in bytes."""

    # The model
    layers: int  # decoder blocks
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qkv_linears: int  # that q, k and v are stored in: 3 or 1
    gate_up_linears: int  # that gate and up are stored in: 2 or 1
    linear_numbers: int  # weights in a block's linears
    has_output_norms: bool  # after o and down (Gemma 2, 3)
    has_head_norms: bool  # of queries and keys (Qwen 3, Gemma 3)
    # Its frozen bytes
    codec: str  # of linears, by its name
    block_bytes: int  # of the largest block
    embedding_bytes: int
    embedding_on_host: bool  # in pinned host memory
    head_bytes: int  # 0: the head is tied to the embedding
    rest_bytes: int  # of the unit that every rank simply has
    dummy_weights: bool  # random, made on the device
    # Its adapters
    adapter: str  # as `adapters.table.ADAPTERS` names it
    adapted: str  # "1" or "0" for each linear of a block in order of use: has it an adapter in any block? "": all have
    lora_rank: int  # of an adapter
    lora_rank_qkv: int  # the sum over the adapters that read this input, in the block with most; so the next three
    lora_rank_o: int
    lora_rank_gate_up: int
    lora_rank_down: int
    adapter_parameters: int  # of a block, the mean
    largest_adapters: int  # parameters of the block that has most
    dropout: float  # of the adapters' inputs
    # Bytes of a number
    stream_bytes: int  # of the residual stream
    compute_bytes: int
    reduce_bytes: int  # in gradient sums
    sent_bytes: int  # of a gradient on its way between ranks (`planning.sending` knows)
    master_bytes: int  # of an adapter parameter's master copy, between updates, beside its working copy
    optimizer_state_bytes: float  # on the GPU for each adapter parameter
    # A step
    batch: int  # rows of a micro-batch
    context: int  # tokens of a row; where rows lie one after the other, the largest micro-batch's over its rows
    accumulation: int  # micro-batches
    no_sync: bool  # gradients are summed over micro-batches before they are reduced
    mean_tokens: int  # of a micro-batch where rows lie one after the other; 0: all rows fill the context
    mean_row: int  # tokens of a row, likewise
    label_share: float  # of the tokens, those that the loss is taken over
    keys_per_query: float  # that a query sees, the mean over queries and blocks
    # Its ranks
    ranks: int
    local_ranks: int
    shards: int  # ranks among which `shard` divides a copy
    reshard: bool  # a block that was gathered is freed between its forward and its backward
    exchange_by_host: bool  # adapters cross between ranks by copy engines through host memory
    # How blocks compute
    fused: bool
    remat: bool  # unfused blocks run under checkpointing
    attention: str  # backend; where blocks have several, the one that takes most memory
    multiprocessors: int  # over which attention's backward splits keys in its deterministic form; 0: default form
    workspace_bytes: int  # that PyTorch gives to cuBLAS on each thread that multiplies
    # Not in rows of the grid that were recorded before
    paged_bytes: int = 0  # of optimizer state in host memory for each adapter parameter, where a GPU is full
    longest_row: int = 0  # tokens, padded; 0: as many as `context` has
    flat: bool = False  # rows of most micro-batches lie one after the other

    @property
    def tokens(self) -> int:
        """The most of a micro-batch on one rank."""
        return self.batch * self.context

    @property
    def usual_tokens(self) -> int:
        """The mean of a micro-batch on one rank."""
        return self.mean_tokens or self.tokens

    @property
    def usual_row(self) -> int:
        """The mean tokens of a row, which attention stays inside of."""
        return self.mean_row or self.context

    @property
    def fullness(self) -> float:
        """Of the most tokens of a micro-batch, the share that it usually has."""
        return self.usual_tokens / self.tokens

    @property
    def step_tokens(self) -> int:
        """Of an optimizer step on all ranks."""
        return self.usual_tokens * self.ranks * self.accumulation

    @property
    def queries(self) -> int:
        """Numbers per token of all query heads; `pairs`: of all key or all value heads."""
        return self.heads * self.head_dim

    @property
    def pairs(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def attention_again(self) -> bool:
        """Whether no level keeps what attention gave: flash-attn's own graph would hold q, k and v with it."""
        return self.attention == "flash_attn"

    @property
    def qkv(self) -> int:
        """Numbers per token of queries, keys and values."""
        return self.queries + 2 * self.pairs

    @property
    def all_adapters(self) -> int:
        """Adapter parameters of the model."""
        return self.adapter_parameters * self.layers


def adapter_columns(rank: int) -> int:
    """Columns that adapters of this rank sum take beside their input (`lora_wide.extra`)."""
    return -(-rank // RANK_ALIGN) * RANK_ALIGN


def pitch(columns: int) -> int:
    """Numbers from row to row of a tensor of `lora_wide.wide`."""
    return -(-columns // LINE) * LINE


def facts_of(
    model: "CausalModel",
    config: "Config",
    world: "World",
    fusion: "Fusion",
    state_bytes: float,
    capability: tuple[int, int] | None = None,
    lengths: "RowLengths | None" = None,
) -> Facts:
    """Read off an assembled model. state_bytes: the optimizer's, on the GPU, per adapter parameter. capability: CUDA's,
    of a card that is not here. lengths: of the rows; None: all fill the context.

    The exchange is taken to be by collectives, and no kernel to split its work in a deterministic form."""
    from fsdp_qlora.kernels.masters import master_bytes
    from fsdp_qlora.optim.optimizers import paged_bytes

    blocks = list(model.blocks.values())
    linears = [m for block in blocks for m in block.linears().values()]
    first = blocks[0].linears()
    adapters = [sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks]
    kinds = {u.name: u for u in model.units}
    others = [u for u in model.units if u.name not in model.blocks]
    embedding = next(u for u in others if u.frozen is model.embedding[0].frozen)
    head = None if model.is_tied() else model.head.frozen.layout.nbytes
    training, memory = config.training, config.memory
    reduce_bytes = {"fp32": 4, "bf16": 2}[memory.reduce_dtype]
    context = config.data.context_length
    flat = bool(fusion.blocks) and lengths is not None and lengths.flat(training.batch_size)
    if lengths is not None:
        context = lengths.width(training.batch_size) if fusion.blocks else lengths.widest
    return Facts(
        layers=len(blocks),
        block_bytes=max(kinds[path].frozen.layout.nbytes for path in model.blocks),
        embedding_bytes=embedding.frozen.layout.nbytes,
        embedding_on_host=embedding.home == "host",
        head_bytes=head or 0,
        rest_bytes=sum(u.frozen.layout.nbytes for u in others if u.home == "device"),
        vocabulary=model.head.weight.shape[0],
        linear_numbers=sum(m.out_features * m.in_features for m in first.values()),
        adapter_parameters=-(-sum(adapters) // len(blocks)),
        largest_adapters=max(adapters),
        codec=_codec(linears),
        stream_bytes=model.precision.stream.itemsize,
        compute_bytes=model.precision.compute.itemsize,
        lora_rank=config.adapter.lora_rank,
        adapter=TRAIN_TYPES[config.model.train_type].adapter,
        reduce_bytes=reduce_bytes,
        sent_bytes=reduce_bytes,
        optimizer_state_bytes=state_bytes,
        batch=training.batch_size,
        context=context,
        accumulation=training.gradient_accumulation_steps,
        no_sync=memory.no_sync,
        dropout=config.adapter.lora_dropout,
        ranks=world.size,
        local_ranks=world.local_size,
        shards=_shards(memory.sharding_strategy, memory.hybrid_shard_size, world),
        reshard=not memory.sharding_strategy.endswith("shard_grad_op"),
        exchange_by_host=False,
        fused=bool(fusion.blocks),
        remat=memory.use_gradient_checkpointing,
        attention=_attention(fusion, flat),
        multiprocessors=0,
        workspace_bytes=workspace(world.device, capability),
        dummy_weights=config.model.dummy_weights,
        master_bytes=master_bytes(model.precision.compute),
        paged_bytes=paged_bytes(training.optimizer) if world.device.type == "cuda" else 0,
        longest_row=0 if lengths is None else lengths.widest,
        flat=flat,
        **(_fused(model, context, lengths) if fusion.blocks else _generic(model, config, context)),
        **_usual(lengths if fusion.blocks else None, training.batch_size),
    )


def workspace(device: Any, capability: tuple[int, int] | None = None) -> int:
    """Bytes that PyTorch lends cuBLAS: 32 MiB from Hopper on, else 8 MiB and 128 KiB (CUDABlas's chosen sizes), unless
    the environment has others."""
    import torch

    from fsdp_qlora.runtime.launcher import cublas_workspace_bytes

    if device.type != "cuda":
        return 0
    told = cublas_workspace_bytes()
    if told is not None:
        return told
    capability = capability or torch.cuda.get_device_capability(device)
    return 32 << 20 if capability >= (9, 0) else (8 << 20) + (128 << 10)


def _shards(strategy: str, group: int, world: "World") -> int:
    if not strategy.startswith("hybrid"):
        return world.size
    return world.local_size if group == -1 else group


def _codec(linears: list[Any]) -> str:
    weight = linears[0].weight
    return str(weight.home.layout.entries[weight.name].codec.name)


def _rank(*linears: Any) -> int:
    return sum(m.lora_A.shape[0] for m in linears if m.lora_A is not None)


def _adapted(specs: list[Any]) -> str:
    by_linear = zip(*(spec.linears for spec in specs), strict=True)
    return "".join("1" if any(m.lora_A is not None for m in linears) else "0" for linears in by_linear)


def _attention(fusion: "Fusion", flat: bool) -> str:
    """Return the backend of most micro-batches, of the blocks whose takes most memory; "" for generic blocks."""
    return max(fusion.documents if flat else fusion.attention, key=ATTENTION.index, default="")


def _usual(lengths: "RowLengths | None", batch_size: int) -> dict[str, Any]:
    if lengths is None:
        return {"mean_tokens": 0, "mean_row": 0, "label_share": 1.0}
    return {
        "mean_tokens": round(min(batch_size, lengths.items) * lengths.mean),
        "mean_row": round(lengths.lengths.mean()),
        "label_share": lengths.label_share,
    }


def _fused(model: "CausalModel", context: int, lengths: "RowLengths | None") -> dict[str, Any]:
    specs = [block.spec for block in model.fused_blocks]
    attention, mlp = specs[0].attention, specs[0].mlp
    windows = [spec.attention.masking.window for spec in specs]
    keys = [keys_seen(context, window) if lengths is None else lengths.keys(window) for window in windows]
    return {
        "hidden": mlp.down.out_features,
        "intermediate": mlp.down.in_features,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "qkv_linears": len(attention.qkv),
        "gate_up_linears": len(mlp.gate_up),
        "lora_rank_qkv": max(_rank(*x.attention.qkv) for x in specs),
        "lora_rank_o": max(_rank(x.attention.o) for x in specs),
        "lora_rank_gate_up": max(_rank(*x.mlp.gate_up) for x in specs),
        "lora_rank_down": max(_rank(x.mlp.down) for x in specs),
        "adapted": _adapted(specs),
        "has_output_norms": mlp.out_norm is not None,
        "has_head_norms": attention.q_norm is not None,
        "keys_per_query": sum(keys) / len(specs),
    }


def _generic(model: "CausalModel", config: "Config", context: int) -> dict[str, Any]:
    """Of an unfused model, from its Hugging Face config; what that does not say is taken as Llama has it."""
    hf = model.backbone.config
    hidden, heads = hf.hidden_size, hf.num_attention_heads
    most = max(_rank(*block.linears().values()) for block in model.blocks.values())
    rank = config.adapter.lora_rank
    return {
        "hidden": hidden,
        "intermediate": getattr(hf, "intermediate_size", None) or 4 * hidden,
        "heads": heads,
        "kv_heads": getattr(hf, "num_key_value_heads", None) or heads,
        "head_dim": getattr(hf, "head_dim", None) or hidden // heads,
        "qkv_linears": 3,
        "adapted": "",
        "gate_up_linears": 2,
        "lora_rank_qkv": min(3 * rank, most),
        "lora_rank_o": rank,
        "lora_rank_gate_up": 2 * rank,
        "lora_rank_down": rank,
        "has_output_norms": False,
        "has_head_norms": False,
        "keys_per_query": sum(keys_seen(context, w) for w in generic_windows(hf, len(model.blocks)))
        / len(model.blocks),
    }


def generic_windows(hf_config: Any, layers: int) -> list[int | None]:
    """Return the window of each layer, None where it has none, as a Hugging Face config says them."""
    window = getattr(hf_config, "sliding_window", None)
    kinds = getattr(hf_config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
