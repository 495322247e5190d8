"""Every option once: type, default with its reason, meaning, unit, price; help, docs and checks are read off here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fsdp_qlora.config.cards import CARDS, MOST_CARDS, rig_of
from fsdp_qlora.config.option import REQUIRED, Option, option, options_of
from fsdp_qlora.config.train_types import TRAIN_TYPES

NOT_BUILT = "is known but not built yet"
Optimizer = Literal[
    "adamw",
    "adam",
    "fused_adam",
    "fused_adamw",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "sgd",
    "adadelta",
]
Sharding = Literal["auto", "full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op"]


@dataclass
class ModelOptions:
    """Model: which one, and how its frozen weights are kept."""

    model_name: str = option(
        REQUIRED,
        """The model to fine-tune: a hub id (meta-llama/Llama-2-70b-hf) or a local folder with config.json and
        safetensors.""",
        "",
        "a hub model is downloaded once into the Hugging Face cache",
        is_path=True,
        known_as=("model", "model_name_or_path", "base_model", "model_id"),
    )
    revision: str | None = option(
        None,
        "Branch, tag or commit of a hub model.",
        "the hub's main branch",
        "none; a commit makes the run repeatable",
        known_as=("model_revision",),
    )
    train_type: str = option(
        "qlora",
        """What trains over what. qlora: LoRA adapters over a base quantized to 4-bit NF4. lora: LoRA adapters over the
        base in the precision's dtype.""",
        "a 4-bit base is what fits a large model on small cards, at nearly the quality of 16 bits (QLoRA paper)",
        "per base parameter 4.1 to 4.5 bits with qlora, 16 or 32 with lora; qlora decodes each weight before each use",
        choices=tuple(TRAIN_TYPES),
        aliases={"custom_lora": "lora", "custom_qlora": "qlora"},
        refused={
            "full": f"full {NOT_BUILT} (it trains every weight); use qlora or lora",
            "hqq_lora": f"hqq_lora {NOT_BUILT} (HQQ quantization); use qlora",
            "bnb_dora": f"bnb_dora {NOT_BUILT} (DoRA); use qlora",
            "hqq_dora": f"hqq_dora {NOT_BUILT} (HQQ quantization and DoRA); use qlora",
            "bnb_llama_pro": f"bnb_llama_pro {NOT_BUILT} (block expansion); use qlora",
            "hqq_llama_pro": f"hqq_llama_pro {NOT_BUILT} (HQQ quantization and block expansion); use qlora",
        },
        known_as=("finetuning_type", "adapter"),
    )
    n_bits: Literal[4] = option(
        4,
        "Bits per weight of the quantized base. 4 is NF4, bitsandbytes' format bit for bit, in blocks of 64 weights.",
        "NF4 keeps 16-bit quality on most tasks; fewer bits do not",
        "fewer bits are smaller and less accurate",
        refused={bits: f"{bits} bits {NOT_BUILT} (needs HQQ); use 4" for bits in (1, 2, 3, 8)},
        known_as=("bits", "load_in_4bit"),
    )
    double_quant: bool = option(
        True,
        "Quantize NF4's scales as well: 8-bit scales in nested blocks of 256.",
        "it saves 0.37 bits per weight (3.2 GB at 70B) with no measurable loss (QLoRA paper)",
        "one more lookup when a weight is decoded",
        known_as=("bnb_4bit_use_double_quant", "use_double_quant", "double_quantization"),
    )
    precision: Literal["fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"] = option(
        "bf16",
        """Floating point types of the run. fp32: float32 throughout. bf16: bfloat16 throughout. fp16_autocast and
        bf16_autocast: float32 residual stream, matmuls under autocast in float16 (with dynamic loss scaling) or
        bfloat16. bf16_buffers_autocast: bfloat16 under autocast, float32 buffers. Adapters' master weights and
        optimizer state are float32 in every mode.""",
        "the smallest and fastest on cards that have it (Ampere and later)",
        "fp32 and autocast take twice the activation memory, fp32 is many times slower; older cards need fp16_autocast",
        aliases={"bfloat16": "bf16", "float32": "fp32"},
        refused={
            half: f"{half} alone is not built (float16 overflows); use fp16_autocast, which cards without bfloat16 "
            "(T4, V100) can run"
            for half in ("fp16", "float16", "half", "16")
        },
        known_as=("dtype", "torch_dtype", "mixed_precision"),
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = option(
        "auto",
        """Attention implementation. sdpa: PyTorch's scaled_dot_product_attention. flash_attention_2: the flash-attn
        package. eager: plain matmuls and softmax. auto: the best that is installed and that the card can run.""",
        "it needs nothing installed; what it chose is told at start",
        "eager needs memory quadratic in context_length; flash_attention_2 has to be compiled at install",
        known_as=("attn_implementation", "flash_attention", "use_flash_attention"),
    )
    fused: Literal["auto", "true", "false"] = option(
        "auto",
        """Run decoder blocks on the fused kernels. auto: where the model's family has them. true: or stop. false:
        never, for comparison: each Hugging Face layer with its linears replaced.""",
        "auto tells at start what it came to",
        "false is slower and takes more memory",
    )
    dummy_weights: bool = option(
        False,
        "Random weights of the model's shape, made from its config alone: to try a rig before downloading 140 GB.",
        "the result of such a run is of no use",
        "same speed and memory as real weights, no download of weights",
    )
    low_memory: bool = option(
        True,
        "Load block by block, so that no rank ever holds the whole unquantized model.",
        "the only way built: host memory stays at the frozen bytes plus a few blocks",
        "none",
        refused={False: f"false {NOT_BUILT} and not planned (each rank would load the whole model); leave it true"},
    )
    loading_workers: int = option(
        -1,
        "Threads per rank that read the checkpoint ahead of the encoder.",
        "it follows the machine's cores",
        "each holds about one tensor in host memory",
        unit="threads",
        at_least=1,
        special={-1: "automatic"},
    )
    llama_pro_path: str | None = option(
        None,
        "Checkpoint expanded with new blocks, for the Llama-Pro train types. Not built yet: only null is accepted.",
        "no train type reads it yet",
        "none",
        is_path=True,
    )


@dataclass
class AdapterOptions:
    """Adapters: the LoRA matrices, the only thing that trains."""

    lora_rank: int = option(
        64,
        "Rank r of the update W + scale * B A of each adapted linear.",
        "fsdp_qlora's and the QLoRA paper's; 8 to 16 is enough for narrow tasks",
        "adapters, gradients and optimizer state grow in proportion: 828 M parameters at 70B and rank 64",
        at_least=1,
        known_as=("lora_r", "r", "rank"),
    )
    lora_alpha: float = option(
        16.0,
        "Numerator of the update's scale: alpha / r, or alpha / sqrt(r) with use_rslora.",
        "fsdp_qlora's and the QLoRA paper's; it works with the default lr",
        "none; doubling it acts much like doubling lr",
        above=0,
    )
    lora_dropout: float = option(
        0.0,
        "Probability of dropping an input element of A during training.",
        "over one to three epochs dropout changes little and costs time (fsdp_qlora's was 0.1)",
        "one more elementwise pass for each adapted linear",
        at_least=0,
        below=1,
    )
    use_rslora: bool = option(
        False,
        "Rank-stabilized scale alpha / sqrt(r) in place of alpha / r.",
        "lora_alpha then means what it means elsewhere; true keeps large ranks from learning too slowly",
        "none",
    )
    lora_target_modules: list[str] = option(  # noqa: RUF009 (a dataclasses.field)
        ["all"],
        """Linears that get an adapter. all: every linear of the decoder layers. default: k_proj, q_proj, v_proj,
        up_proj, down_proj, gate_proj. Otherwise names, or regular expressions over whole module paths; one that matches
        nothing is an error. Commas or spaces separate them on the command line.""",
        "it comes closest to full fine-tuning (QLoRA paper); default leaves out o_proj",
        "adapter memory and time in proportion to the linears chosen",
        known_as=("target_modules", "lora_target", "lora_target_linear"),
    )


@dataclass
class DataOptions:
    """Data: rows, their form, and what of them is learnt."""

    dataset: str = option(
        "alpaca_sample",
        """Training rows: alpaca, alpaca_sample (its first 512 rows), dummy (synthetic rows, nothing read), guanaco,
        sql, orca_math, any hub dataset (id, id:config or id:config:split), a local .json, .jsonl, .parquet, .csv, .tsv
        or .arrow file, also .gz, .zst, .bz2, .xz, a folder of such files or one of save_to_disk, - for JSON lines from
        standard input. Several with commas: a.jsonl,b.jsonl is all rows of both, a.jsonl:0.7,b.jsonl:0.3 as many as
        these shares allow, none twice.""",
        "a small download that shows whether everything works",
        "a hub dataset is downloaded once into the Hugging Face cache",
        known_as=("data", "data_path", "dataset_name", "train_file", "datasets"),
        is_path=True,
    )
    dataset_format: Literal["auto", "alpaca", "prompt_completion", "text", "messages"] = option(
        "auto",
        """Form of a row. alpaca: instruction, input, output (system, history). prompt_completion: prompt, completion.
        text: one text, learnt whole. messages: role and content turns (also ShareGPT's conversations), put through the
        chat template. auto: recognised from the columns. docs/rows.md has all forms.""",
        "it is right wherever the columns have their usual names; what it chose is told at start",
        "none",
        aliases={"sharegpt": "messages", "chat": "messages", "chatml": "messages", "openai": "messages"},
        known_as=("data_format", "template"),
    )
    columns: list[str] | None = option(  # noqa: RUF009 (a dataclasses.field)
        None,
        "Columns of other names, FIELD=COLUMN: instruction=q,output=a. Fields are those of the forms in docs/rows.md.",
        "the usual names are recognised",
        "none",
        known_as=("column_mapping", "field_mapping", "prompt_column", "response_column"),
    )
    prompt_template: str | None = option(
        None,
        """Jinja file that puts a row's columns into words. What stands between {% generation %} and {% endgeneration %}
        is learnt; without these marks it renders the prompt, and the answer is the row's completion, response, answer
        or output.""",
        "each form has its usual words",
        "none",
        is_path=True,
        known_as=("prompt_format", "instruction_template"),
    )
    chat_template: str | None = option(
        None,
        """Jinja file in the place of the tokenizer's chat template, or the name of one where the tokenizer has several;
        saved with the tokenizer.""",
        "the tokenizer's own is what the model knows",
        "none",
        is_path=True,
        known_as=("chat_template_path", "chat_template_file", "custom_chat_template"),
    )
    dataset_samples: int | None = option(
        None,
        "Use only this many rows, the first ones.",
        "all of them",
        "none",
        unit="rows",
        at_least=1,
        known_as=("max_samples", "num_samples", "max_train_samples"),
    )
    context_length: int = option(
        512,
        "Longest row, prompt and answer together; the rest of a longer row is cut off.",
        "it holds nearly all Alpaca-like rows",
        "activations, logits and time grow in proportion, attention's time with the square",
        unit="tokens",
        at_least=2,
        known_as=("max_seq_length", "max_length", "cutoff_len", "sequence_len", "block_size"),
    )
    text_overflow: Literal["auto", "split", "cut"] = option(
        "auto",
        """Rows of the form text that are longer than the context. split: into rows of context_length. cut: the rest is
        lost. auto: split.""",
        "a long text is mostly beyond one context",
        "split makes more rows",
        known_as=("overflow", "truncation", "group_texts"),
    )
    bad_rows: Literal["stop", "skip"] = option(
        "stop",
        """Rows that cannot be taken (malformed, no text, a role that nobody knows, a turn whose place in the chat
        template's text is not certain). stop: end with the first one's line. skip: leave them out and count them.""",
        "a mistake in the rows is seen",
        "skip loses rows",
        known_as=("on_bad_rows", "skip_errors", "ignore_errors"),
    )
    show_rows: int = option(
        0,
        "Print so many of the first rows before training, what is learnt of them marked. With --plan_only too.",
        "the summary's counts are enough to see that all is well",
        "none",
        unit="rows",
        at_least=0,
        known_as=("debug_rows", "preview", "print_rows"),
    )
    rows_cache: str | None = option(
        "auto",
        """Folder where tokenized rows are kept by content, for the node's other ranks and the next run. auto:
        fsdp_qlora/rows in the user's cache folder. null: none. Entries that nobody has read for 30 days go.""",
        "a million rows are tokenized once",
        "5 bytes a token on disk; without it every rank tokenizes",
        is_path=True,
        known_as=("dataset_prepared_path", "tokenized_path", "preprocessing_cache"),
    )
    train_on_prompt: bool = option(
        False,
        "Take the loss over the prompt's tokens too, instead of the answer's alone.",
        "the model is to answer, not to write questions",
        "none",
        known_as=("train_on_inputs", "train_on_input", "train_on_source"),
    )


@dataclass
class TrainingOptions:
    """Training: batch, length, optimizer and schedule."""

    batch_size: int = option(
        1,
        """Rows per rank in one forward and backward pass (the micro-batch). Rows of one optimizer step:
        batch_size * gradient_accumulation_steps * ranks. -1: gradient_accumulation_steps rows per rank, in
        micro-batches of the size that the plan finds fastest.""",
        "it fits wherever anything fits",
        "activation memory grows in proportion; larger is faster, most of all with CPU offload",
        unit="rows",
        at_least=1,
        special={-1: "the plan decides"},
        known_as=("per_device_train_batch_size", "micro_batch_size", "train_batch_size"),
    )
    gradient_accumulation_steps: int = option(
        1,
        """Micro-batches per optimizer step. The loss is the mean over the label tokens of the whole step, so 4 x 1 row
        equals 1 x 4 rows.""",
        "every pass updates",
        "a larger effective batch without more activation memory; the step takes as many times longer",
        unit="micro-batches",
        at_least=1,
        known_as=("grad_accum", "accumulation_steps"),
    )
    num_epochs: int = option(
        1,
        "Passes over the dataset.",
        "instruction data is overfitted quickly",
        "time in proportion",
        unit="epochs",
        at_least=1,
        known_as=("epochs", "num_train_epochs"),
    )
    max_steps: int = option(
        -1,
        "Stop after this many optimizer steps, if num_epochs have not ended before; the schedule is fitted to it.",
        "num_epochs decides",
        "none",
        unit="optimizer steps",
        at_least=1,
        special={-1: "no limit"},
    )
    lr: float = option(
        2e-4,
        "Peak learning rate.",
        "the QLoRA paper's up to 13B; take 1e-4 for 33B and above (fsdp_qlora's 1e-5 learns very slowly)",
        "none; too high shows as a loss that jumps",
        above=0,
        known_as=("learning_rate",),
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine",
        """Learning rate after the warm-up: cosine and linear fall to 0 at the last step; constant stays, and has no
        warm-up.""",
        "it ends at a lower loss than constant at the same length",
        "none",
        known_as=("lr_scheduler_type", "scheduler"),
    )
    warmup_ratio: float = option(
        0.03,
        "Share of all optimizer steps over which the learning rate climbs from 0 to lr.",
        "the QLoRA paper's; it keeps Adam's first, noisy steps small",
        "none",
        at_least=0,
        at_most=1,
    )
    wd: float = option(
        0.0,
        "Weight decay of the adapters: decoupled in the adamw optimizers, an L2 term in the others.",
        "adapters start at zero update and stay small (fsdp_qlora's was 0.1)",
        "none",
        at_least=0,
        known_as=("weight_decay",),
    )
    optimizer: Optimizer = option(  # noqa: RUF009 (a dataclasses.field)
        "adamw",
        """Optimizer over the adapters, state sharded as they are. adamw and adam take PyTorch's fused kernel on a GPU,
        fused_adamw and fused_adam everywhere. adamw_8bit: AdamW with its state in 8 bits (bitsandbytes). paged_adamw
        and paged_adamw_8bit: the same two with their state in unified memory, which leaves a full GPU for host
        memory.""",
        "LoRA's published learning rates are for it, and its state is exact",
        """state per adapter parameter, and at 70B and rank 64 over all ranks together: the Adams and adadelta 8 bytes
        (6.2 GiB), adamw_8bit 2 (1.6 GiB) at nearly the same loss, sgd 0; the paged ones need as much of host memory
        instead, and on a full GPU their state crosses PCIe twice a step""",
        aliases={"paged_adamw_32bit": "paged_adamw", "adamw_bnb_8bit": "adamw_8bit"},
        known_as=("optim",),
    )
    apply_gradient_clipping: bool = option(
        True,
        "Scale the gradient down to grad_norm where its norm over all adapters and ranks is larger.",
        "one bad row cannot throw the adapters off",
        "one small reduction over the ranks each step",
    )
    grad_norm: float = option(
        1.0,
        "Largest L2 norm of the gradient.",
        "the field's usual value (fsdp_qlora's was 0.3)",
        "none",
        above=0,
        known_as=("max_grad_norm", "gradient_clipping", "clip_grad_norm"),
    )
    seed: int = option(
        42,
        "Seed of the adapters' initial values, the rows' order and the dropout.",
        "custom",
        "none",
        at_least=0,
        at_most=2**32 - 1,
        known_as=("random_seed",),
    )
    deterministic: bool = option(
        False,
        """Sum in a fixed order everywhere: on a GPU, runs of one command give the same losses to the last bit, whatever
        the plan keeps, streams or offloads. For one machine, number of ranks and version of every library. Without a
        GPU that is so anyway, and the option is an error.""",
        "cuDNN's attention, the fastest on many cards, sums the queries' gradient in the order that its parts end",
        """attention's backward is slower and takes more memory: FlashAttention-2 in a form that keeps one float32 sum
        for each part of the keys; cuBLAS takes 32 MiB for each thread that multiplies""",
        known_as=("full_determinism", "use_deterministic_algorithms"),
    )


@dataclass
class MemoryOptions:
    """Memory: where the model is kept and what is computed twice to save space. Left alone, the plan decides."""

    plan_only: bool = option(
        False,
        "Print the plan (what goes where, GiB, seconds per step) and stop, before any weight is downloaded or made.",
        "to train is the usual wish",
        "none: seconds; on a GPU a second of measuring more",
        known_as=("dry_run", "estimate_memory"),
    )
    plan_for: str | None = option(
        None,
        f"""With plan_only, plan for a rig that is not here: NxCARD, such as 2x4090, N from 1 to {MOST_CARDS} cards in
        one host, CARD one of {", ".join(CARDS)}. One process plans for all N ranks and needs no GPU. Rates are
        published ones of that card times what measured cards reach of theirs: expected, not measured.""",
        "null plans for this machine, and measures it",
        "none: seconds; on the rig itself plan_only measures what this assumes",
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
        "null: as many as the plan finds room for",
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
        "Use the reentrant variant of torch.utils.checkpoint. Results are the same.",
        "what PyTorch recommends",
        "none worth naming; it is here for comparison and for old scripts",
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
        """Most GPU memory a rank may allocate (PyTorch's allocator; the CUDA context and NCCL take about 1 GiB more).
        Enforced: a run that needs more fails as it would on a smaller card. With plan_for: all that the card has.""",
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


@dataclass
class OutputOptions:
    """Output: what is left behind and what is shown."""

    output_dir: str = option(
        "output",
        "Folder for the adapter in PEFT's format, the tokenizer, config.yaml, metrics.jsonl and loss.png.",
        "under the current folder",
        "adapters take 2 or 4 bytes a parameter",
        is_path=True,
    )
    overwrite_output_dir: bool = option(
        False,
        "Write into an output_dir that is not empty.",
        "an earlier adapter is not lost by accident",
        "files of the same name are replaced",
    )
    save_model: bool = option(
        True,
        "Save the adapter and tokenizer at the end, and on Ctrl-C.",
        "training is not lost by forgetting a flag (fsdp_qlora's was false)",
        "disk space of the adapter",
    )
    log_to: list[Literal["tqdm", "stdout", "wandb", "tensorboard"]] = option(  # noqa: RUF009 (a dataclasses.field)
        ["tqdm"],
        """Where progress goes, besides metrics.jsonl. tqdm: a progress bar. stdout: one line a step. wandb,
        tensorboard: those loggers, which must be installed. Commas or spaces separate several.""",
        "it needs no account and leaves no files",
        "wandb needs a network, or WANDB_MODE=offline",
        known_as=("report_to", "logger", "log_with"),
    )
    project_name: str = option(
        "fsdp_qlora",
        "Project in wandb.",
        "the program's name",
        "none",
        known_as=("wandb_project",),
    )
    name: str | None = option(
        None, "Run name in wandb.", "wandb makes one up", "none", known_as=("run_name", "wandb_name")
    )
    group: str | None = option(
        None, "Run group in wandb.", "most runs belong to none", "none", known_as=("wandb_group",)
    )
    entity: str | None = option(None, "User or team in wandb.", "the account's own", "none", known_as=("wandb_entity",))
    verbose: bool = option(
        False,
        "Print more at start: cards, versions, rates measured of the machine, seconds until the first step by stage.",
        "the short version is enough to see that all is well",
        "none",
    )


@dataclass
class ProfileOptions:
    """Profile: a trace of a few steps by torch.profiler."""

    profile: bool = option(
        False,
        "Record a few steps after the warm-up and write tables of where the time went.",
        "recording slows those steps",
        "the steps recorded are slower",
    )
    profiling_output: str = option(
        "profiles", "Folder for what the profiler writes.", "apart from the adapter's folder", "none", is_path=True
    )
    with_stack: bool = option(
        False,
        "Record the Python line behind each operation.",
        "it distorts the times most",
        "slower steps, much larger traces",
    )
    with_shapes: bool = option(
        False, "Record the operations' input shapes.", "seldom needed", "slower steps, larger traces"
    )
    profile_memory: bool = option(
        False, "Record allocations and frees.", "seldom needed", "slower steps, larger traces"
    )
    export_trace: bool = option(
        False,
        "Write a Chrome trace for each rank (open it in ui.perfetto.dev).",
        "it can be hundreds of MB",
        "disk space and seconds at the end of the recording",
    )
    export_memory_timeline: bool = option(
        False,
        "Write memory over time by category for each rank. Turns on with_stack, with_shapes and profile_memory.",
        "it is slow to write",
        "as those three together, and minutes of export for large models",
    )


@dataclass
class LaunchOptions:
    """Launch: checked against what torchrun started, never changing it; a mismatch is an error showing the command."""

    world_size: int = option(
        -1,
        "Ranks (processes, one per GPU) that the run must have.",
        "most runs take what was launched",
        "none",
        unit="ranks",
        at_least=1,
        special={-1: "whatever was launched"},
        known_as=("num_processes", "nproc_per_node", "num_gpus"),
    )
    master_addr: str | None = option(
        None, "Address of the rendezvous host that torchrun must have used.", "it is not checked", "none"
    )
    master_port: int | None = option(
        None,
        "Port of the rendezvous that torchrun must have used.",
        "it is not checked",
        "none",
        at_least=1,
        at_most=65535,
    )


@dataclass
class Config:
    """All options of a run, in groups. In files and as flags they are flat: every name is unique."""

    model: ModelOptions
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    launch: LaunchOptions = field(default_factory=LaunchOptions)

    def to_flat(self) -> dict[str, Any]:
        """{option name: value} in the order of the groups; lists are copied."""
        values = {name: getattr(getattr(self, item.group), name) for name, item in OPTIONS.items()}
        return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "Config":
        """The Config with these options and defaults for the rest; values are taken as they are, unchecked."""
        groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name, value in values.items():
            groups[OPTIONS[name].group][name] = value
        return cls(**{group: GROUPS[group](**chosen) for group, chosen in groups.items()})


GROUPS: dict[str, type] = {item.name: item.type for item in dataclasses.fields(Config) if isinstance(item.type, type)}
OPTIONS: dict[str, Option] = {item.name: item for group, kind in GROUPS.items() for item in options_of(group, kind)}
