"""The options of the group adapter: the LoRA matrices."""

from dataclasses import dataclass

from fsdp_qlora.config.option import option


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
        """Numerator of the update's scale: alpha / r, or alpha / sqrt(r) with use_rslora. Doubling it acts much like
        doubling lr.""",
        "fsdp_qlora's and the QLoRA paper's; it works with the default lr",
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
