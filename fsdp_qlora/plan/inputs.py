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
RANK_ALIGN = 8  # numbers: the adapters' columns beside an input (`kernels/lora_wide.py`, ALIGN)


@dataclass(frozen=True)
class Facts:
    """A model, a run and how its blocks compute. Sizes in numbers where no unit is named, `_bytes` in bytes.

    layers: decoder blocks. block_bytes: frozen bytes of the largest block. embedding_bytes, head_bytes (0 where the
    head is tied to the embedding), rest_bytes: of those units. embedding_on_host: in pinned host memory.
    linear_numbers: weights in a block's linears. qkv_linears, gate_up_linears: in how many linears they are stored.
    rank: of an adapter; rank_*: sum over the adapters that read this input, in the block with most. adapter_parameters:
    of a block, the mean; most_adapters: of the block that has most of them, where they are not alike (else 0).
    norms_after: norms follow o and down (Gemma 2, 3). head_norms: queries and keys are normalised (Qwen 3, Gemma 3).
    keys: that a query sees, the mean over queries and blocks. stream_bytes, compute_bytes, reduce_bytes: of a number of
    the residual stream, in compute and in gradient sums. state_bytes: of optimizer state on the GPU per adapter
    parameter. shards: ranks among which `shard` divides a copy. reshard: whether a block that was gathered is freed
    between its forward and its backward. remat: whether unfused blocks run under checkpointing. workspace_bytes: that
    PyTorch gives to cuBLAS on each thread that multiplies. dummy: random weights, made on the device. exchange_by_host:
    adapters cross between ranks by copy engines through host memory. master_bytes: of an adapter parameter's master
    copy, between updates, beside its working copy. sent_bytes: of a gradient's number on its way between ranks
    (`planning.sending` knows). adapted: "1" or "0" for each linear of a block in order of use, by whether it has an
    adapter in any block; "" for all. multiprocessors: of the card, over which attention's backward splits the keys in
    its deterministic form; 0 for its default. context: tokens of a row, or of the largest micro-batch shared among its
    rows where these lie one after the other; mean_tokens: of such micro-batches, the mean, and mean_row: of the rows in
    it (0: all fill the context). label_share: of the tokens, those that the loss is taken over.
    """

    layers: int
    block_bytes: int
    embedding_bytes: int
    embedding_on_host: bool
    head_bytes: int
    rest_bytes: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    linear_numbers: int
    qkv_linears: int
    gate_up_linears: int
    rank: int
    rank_qkv: int
    rank_o: int
    rank_gate_up: int
    rank_down: int
    adapter_parameters: int
    norms_after: bool
    head_norms: bool
    codec: str
    stream_bytes: int
    compute_bytes: int
    reduce_bytes: int
    state_bytes: float
    batch: int
    context: int
    accumulation: int
    no_sync: bool
    dropout: float
    ranks: int
    local_ranks: int
    shards: int
    reshard: bool
    fused: bool
    remat: bool
    attention: str
    keys: float
    workspace_bytes: int
    dummy: bool
    most_adapters: int = 0
    exchange_by_host: bool = False
    master_bytes: int = 4  # this and the next as they were until 2026-11-25: rows of the grid from before do not say
    sent_bytes: int = 4
    adapted: str = ""
    multiprocessors: int = 0
    mean_tokens: int = 0
    mean_row: int = 0
    label_share: float = 1.0
    adapter: str = "lora"  # as `adapters.table.ADAPTERS` names it

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

    @property
    def largest_adapters(self) -> int:
        """Adapter parameters of the block that has most."""
        return max(self.adapter_parameters, self.most_adapters)


def beside(rank: int) -> int:
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
    """Read off an assembled model, after `fuse`. state_bytes: the optimizer's, on the GPU, per adapter parameter.
    capability: CUDA's, of a card that is not here. lengths: of the rows; None: all fill the context."""
    from fsdp_qlora.kernels.masters import master_bytes

    blocks = list(model.blocks.values())
    linears = [m for block in blocks for m in block.linears().values()]
    first = blocks[0].linears()
    adapters = [sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks]
    kinds = {u.name: u for u in model.units}
    others = [u for u in model.units if u.name not in model.blocks]
    embedding = next(u for u in others if u.frozen is model.embedding[0].frozen)
    head = None if model.is_tied() else model.head.frozen.layout.nbytes
    training, memory = config.training, config.memory
    context = config.data.context_length
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
        most_adapters=max(adapters) if len(set(adapters)) > 1 else 0,
        codec=_codec(linears),
        stream_bytes=model.precision.stream.itemsize,
        compute_bytes=model.precision.compute.itemsize,
        rank=config.adapter.lora_rank,
        adapter=TRAIN_TYPES[config.model.train_type].adapter,
        reduce_bytes={"fp32": 4, "bf16": 2}[memory.reduce_dtype],
        state_bytes=state_bytes,
        batch=training.batch_size,
        context=context,
        accumulation=training.gradient_accumulation_steps,
        no_sync=memory.no_sync,
        dropout=config.adapter.lora_dropout,
        ranks=world.size,
        local_ranks=world.local_size,
        shards=_shards(memory.sharding_strategy, memory.hybrid_shard_size, world),
        reshard=not memory.sharding_strategy.endswith("shard_grad_op"),
        fused=bool(fusion.blocks),
        remat=memory.use_gradient_checkpointing,
        attention=_attention(fusion, lengths),
        workspace_bytes=workspace(world.device, capability),
        dummy=config.model.dummy_weights,
        master_bytes=master_bytes(model.precision.compute),
        **(_fused(model, context, lengths) if fusion.blocks else _generic(model, config, context)),
        **(_usual(lengths, training.batch_size) if fusion.blocks and lengths is not None else {}),
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


def _attention(fusion: "Fusion", lengths: "RowLengths | None") -> str:
    """Return the backend of most micro-batches, "" for generic blocks: rows are seldom of one length."""
    if lengths is not None and fusion.documents and lengths.lengths.min() < lengths.lengths.max():
        return fusion.documents[0]
    return fusion.attention[0] if fusion.attention else ""


def _usual(lengths: "RowLengths", batch_size: int) -> dict[str, Any]:
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
        "inner": mlp.down.in_features,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "qkv_linears": len(attention.qkv),
        "gate_up_linears": len(mlp.gate_up),
        "rank_qkv": max(_rank(*x.attention.qkv) for x in specs),
        "rank_o": max(_rank(x.attention.o) for x in specs),
        "rank_gate_up": max(_rank(*x.mlp.gate_up) for x in specs),
        "rank_down": max(_rank(x.mlp.down) for x in specs),
        "adapted": _adapted(specs),
        "norms_after": mlp.out_norm is not None,
        "head_norms": attention.q_norm is not None,
        "keys": sum(keys) / len(specs),
    }


def _generic(model: "CausalModel", config: "Config", context: int) -> dict[str, Any]:
    """Of an unfused model, from its Hugging Face config; what that does not say is taken as Llama has it."""
    hf = model.backbone.config
    hidden, heads = hf.hidden_size, hf.num_attention_heads
    most = max(_rank(*block.linears().values()) for block in model.blocks.values())
    rank = config.adapter.lora_rank
    return {
        "hidden": hidden,
        "inner": getattr(hf, "intermediate_size", None) or 4 * hidden,
        "heads": heads,
        "kv_heads": getattr(hf, "num_key_value_heads", None) or heads,
        "head_dim": getattr(hf, "head_dim", None) or hidden // heads,
        "qkv_linears": 3,
        "gate_up_linears": 2,
        "rank_qkv": min(3 * rank, most),
        "rank_o": rank,
        "rank_gate_up": 2 * rank,
        "rank_down": rank,
        "norms_after": False,
        "head_norms": False,
        "keys": keys_seen(context, getattr(hf, "sliding_window", None)),
    }
