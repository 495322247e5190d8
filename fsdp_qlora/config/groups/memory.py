"""The options of the group memory: what the plan may decide and what is fixed."""

from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.config.cards import CARDS, MOST_CARDS, rig_of
from fsdp_qlora.config.option import option

Sharding = Literal["auto", "full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op"]


@dataclass
class MemoryOptions:
    """Memory: where the model is kept and what is computed twice to save space. Left alone, the plan decides."""

    plan_only: bool = option(
        False,
        "Print the plan (what goes where, GiB, seconds per step) and stop, before any weight is downloaded or made.",
        "to train is the usual wish",
        "seconds; on a GPU a second of measuring more",
        known_as=("dry_run", "estimate_memory"),
    )
    plan_for: str | None = option(
        None,
        f"""With plan_only, plan for a rig that is not here: NxCARD, such as 2x4090, N from 1 to {MOST_CARDS} cards in
        one host, CARD one of {", ".join(CARDS)}. One process plans for all N ranks and needs no GPU. Rates are
        published ones of that card times what measured cards reach of theirs: expected, not measured.""",
        "null plans for this machine, and measures it",
        "seconds; on the rig itself plan_only measures what this assumes",
        check=rig_of,
        known_as=("rig", "gpu", "gpu_type", "device_name"),
    )
    link_gbps: float | None = option(
        None,
        """With plan_for: gigabytes (not bits) a second that copies from pinned host memory to each card reach, all
        cards copying at once. About 26 on 16 lanes of PCI Express 4.0, 13 on 8 of them, as most desktop boards give
        each of two cards, twice that with 5.0.""",
        "null is 16 lanes of the card's own generation",
        "blocks that are streamed and activations that wait in host memory cross it",
        unit="GB/s per card",
        above=0,
        known_as=("pcie_bandwidth", "link_gb_per_second", "host_bandwidth"),
    )
    sharding_strategy: Sharding = option(  # noqa: RUF009 (a dataclasses.field)
        "auto",
        """How the ranks divide the model. auto: the plan decides. full_shard: each keeps 1/ranks of every block and
        gathers it for forward and again for backward. shard_grad_op: gathered once, kept until backward. ddp: a whole
        copy on each. hybrid_*: the same within groups of hybrid_shard_size ranks, copies between groups.""",
        "what is fastest depends on the cards, the link between them and the model",
        "full_shard moves every block twice a step; shard_grad_op once, with the whole base in memory; ddp never",
        known_as=("fsdp", "fsdp_sharding_strategy"),
    )
    hybrid_shard_size: int = option(
        -1,
        "Ranks that share one copy of the model under hybrid_*.",
        "gathers then never cross the network",
        "a larger group takes less memory on each GPU and moves more between them",
        unit="ranks",
        at_least=1,
        special={-1: "the ranks of a node"},
    )
    use_cpu_offload: bool | None = option(
        None,
        """Keep the frozen base in host memory, one pinned copy for all ranks of a node, and copy each block to the GPU
        ahead of its use; what the GPU has room for stays there. Adapters and optimizer stay on the GPU. false: never.
        null: the plan decides.""",
        "the plan knows what fits and what is faster",
        "the base leaves the GPUs for host RAM (35 GB at 70B) and crosses PCIe up to twice a step",
        known_as=("cpu_offload", "offload_params", "fsdp_offload_params"),
    )
    cpu_offload_by: Literal["stream", "fsdp2"] = option(
        "stream",
        """Who brings offloaded blocks to the GPU. stream: each rank copies them from the node's one copy. fsdp2: each
        rank holds its shard in host memory, FSDP2 copies it and gathers the rest from the other ranks.""",
        "nothing is gathered between GPUs, and the copies need none of their multiprocessors",
        "fsdp2 is slower wherever it was measured; it is here for comparison",
    )
    resident_blocks: int | None = option(
        None,
        "Blocks that stay on the GPU under use_cpu_offload, spread evenly among the streamed ones.",
        "as many as the plan finds room for",
        "each takes its frozen bytes on every GPU (0.41 GiB at 70B) and needs no copy",
        unit="blocks",
        at_least=0,
    )
    use_gradient_checkpointing: bool = option(
        True,
        """Keep part of what a block computes for backward and compute the rest again there: fused blocks keep what the
        plan decides (or keep_activations says), others their input alone. false: every block keeps everything.""",
        "without it activations outgrow small cards at once",
        "about a third more arithmetic for a fraction of the activation memory",
        known_as=("gradient_checkpointing", "activation_checkpointing"),
    )
    reentrant_checkpointing: bool = option(
        False,
        """Use the reentrant variant of torch.utils.checkpoint. Results are the same; it is here for comparison and for
        old scripts.""",
        "what PyTorch recommends",
        known_as=("use_reentrant",),
    )
    keep_activations: Literal["auto", "input", "halves", "attention", "qkv", "all"] = option(
        "auto",
        """What a fused block keeps for backward under gradient checkpointing, each value what the one before it keeps
        and more. input: its input. halves: + the MLP's input. attention: + attention's output and row sums. qkv: +
        queries, keys and values. all: + the MLP's gate and up. auto: the plan decides, block by block.""",
        "memory that is left buys back recomputation",
        "per token and block, in 16 bits at 8B / 70B: 8 / 16 KiB, 16 / 32, 24 / 49, 36 / 69, 92 / 181; each is faster",
        known_as=("keep_level", "checkpoint_level"),
    )
    use_activation_cpu_offload: bool | None = option(
        None,
        """Let what fused blocks keep for backward wait in pinned host memory, copied out and back while the GPU
        computes. null: the plan decides, block by block.""",
        "the plan knows what the GPU has room for and what the link has time for",
        """no GPU memory for kept activations beyond two blocks', for PCIe traffic; hidden where a block computes longer
        than its copy""",
        known_as=("activation_offloading", "offload_activations"),
    )
    no_sync: bool = option(
        False,
        "With gradient accumulation, sum the adapters' gradients locally and reduce them over the ranks once per step.",
        "gradients stay sharded between micro-batches",
        "fewer reductions, and on each rank the whole adapters' gradients in float32 (3.3 GB at 70B and rank 64)",
    )
    gpu_memory_gib: float | None = option(
        None,
        """Most GPU memory a rank may take of its card, as nvidia-smi counts it: CUDA and its libraries, about 1.25 GiB,
        included. Enforced: a run that needs more fails as it would on a smaller card.""",
        "null is all that is free",
        "for sharing a card, and for trying on a large card what a small one can do",
        unit="GiB per rank",
        above=0,
        known_as=("max_memory", "gpu_memory_limit"),
    )
    host_memory_gib: float | None = option(
        None,
        """Most host memory the plan may give to frozen bytes and kept activations on a node, all its ranks together;
        Python and its libraries take 2 to 3 GiB a rank more.""",
        "null is nine tenths of what is available; with plan_for, of what a machine of 64 GiB has left",
        "less leaves more for other programs, and fewer activations wait there",
        unit="GiB per node",
        above=0,
    )
    exchange_by: Literal["auto", "host", "nccl"] = option(
        "auto",
        """How the adapters' gradients and new values cross between GPUs. host: the copy engines carry them through
        memory that the node's ranks share. nccl: its kernels do. auto: host on one node whose cards have no peer
        access, else nccl.""",
        "without peer access all bytes go through host memory anyway, and kernels that wait there slow the others down",
        """host takes twice a block's adapters, in float32, of host memory for each rank but one (0.08 GiB at 70B and
        rank 64 on two GPUs)""",
    )
    reduce_dtype: Literal["fp32", "bf16"] = option(
        "fp32",
        "Type in which the adapters' gradients are summed over the ranks.",
        "small gradients are not rounded away",
        "bf16 halves the bytes that NCCL sends; through host memory they cross as they are in any case",
    )
