"""The options of the group training: batch, length, optimizer and schedule."""

from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.config.option import option

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
        unit="optimizer steps",
        at_least=1,
        special={-1: "no limit"},
    )
    lr: float = option(
        2e-4,
        "Peak learning rate; too high shows as a loss that jumps.",
        "the QLoRA paper's up to 13B; take 1e-4 for 33B and above (fsdp_qlora's 1e-5 learns very slowly)",
        above=0,
        known_as=("learning_rate",),
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine",
        """Learning rate after the warm-up: cosine and linear fall to 0 at the last step; constant stays, and has no
        warm-up.""",
        "it ends at a lower loss than constant at the same length",
        known_as=("lr_scheduler_type", "scheduler"),
    )
    warmup_ratio: float = option(
        0.03,
        "Share of all optimizer steps over which the learning rate climbs from 0 to lr.",
        "the QLoRA paper's; it keeps Adam's first, noisy steps small",
        at_least=0,
        at_most=1,
    )
    wd: float = option(
        0.0,
        "Weight decay of the adapters: decoupled in the adamw optimizers, an L2 term in the others.",
        "adapters start at zero update and stay small (fsdp_qlora's was 0.1)",
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
        above=0,
        known_as=("max_grad_norm", "gradient_clipping", "clip_grad_norm"),
    )
    seed: int = option(
        42,
        "Seed of the adapters' initial values, the rows' order and the dropout.",
        "custom",
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
