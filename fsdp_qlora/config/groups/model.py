"""The options of the group model: the model and how its frozen weights are stored."""

from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.config.option import NOT_BUILT, REQUIRED, option
from fsdp_qlora.config.train_types import TRAIN_TYPES


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
        "Branch, tag or commit of a hub model; a commit makes the run repeatable.",
        "the hub's main branch",
        known_as=("model_revision",),
    )
    train_type: str = option(
        "qlora",
        """What trains over what. qlora: LoRA adapters over a base quantized to 4-bit NF4. hqq_lora: over a base that
        HQQ quantizes to n_bits. lora: over the base in the precision's dtype. bnb_dora, hqq_dora, dora: DoRA over the
        same three, LoRA with a trained magnitude for each row of a weight.""",
        "a 4-bit base is what fits a large model on small cards, at nearly the quality of 16 bits (QLoRA paper)",
        """per base parameter 4.1 to 4.5 bits with qlora, n_bits + 32 / hqq_group_size with hqq_lora, 16 or 32 with
        lora; a quantized weight is decoded before each use. DoRA saves the outputs of o_proj and down_proj too, and
        with lora_dropout it does without fused kernels""",
        choices=tuple(TRAIN_TYPES),
        aliases={"custom_lora": "lora", "custom_qlora": "qlora"},
        refused={
            "full": f"full {NOT_BUILT} (it trains every weight); use qlora or lora",
            "bnb_llama_pro": f"bnb_llama_pro {NOT_BUILT} (block expansion); use qlora",
            "hqq_llama_pro": f"hqq_llama_pro {NOT_BUILT} (block expansion); use hqq_lora",
        },
        known_as=("finetuning_type", "adapter"),
    )
    double_quant: bool = option(
        True,
        "Quantize NF4's scales as well: 8-bit scales in nested blocks of 256.",
        "it saves 0.37 bits per weight (3.2 GB at 70B) with no measurable loss (QLoRA paper)",
        "one more lookup when a weight is decoded",
        known_as=("bnb_4bit_use_double_quant", "use_double_quant", "double_quantization"),
    )
    n_bits: Literal[8, 4, 3, 2, 1] | None = option(
        None,
        """Bits per weight of the quantized base. qlora has 4, hqq_lora all of them. null: those of a checkpoint that is
        published in HQQ, else 4.""",
        "4 bits keep 16-bit quality on most tasks, fewer do not; what is published in other bits stays so",
        "memory and copies in proportion: a 70B base takes 70 GB in 8 bits, 26 in 3, 17 in 2, and 4 for HQQ's scales",
        known_as=("bits", "load_in_4bit", "nbits", "hqq_nbits", "quantization_bit"),
    )
    hqq_group_size: Literal[32, 64, 128] | None = option(
        None,
        "Weights that share one of HQQ's scales and zeros. null: as many as in a checkpoint in HQQ, else 64.",
        "64 is fsdp_qlora's and hqq's own",
        "32 / group bits per weight in 16-bit precisions, 64 / group in fp32; below 4 bits smaller groups lose less",
        known_as=("group_size", "q_group_size"),
    )
    hqq_axis: Literal[1, 0] | None = option(
        None,
        """Where HQQ's groups lie in a weight [outputs, inputs]. 1: along a row, among the weights of one output. 0:
        along a column, of one input. null: as in a checkpoint in HQQ, else 1.""",
        "1 is fsdp_qlora's, and what hqq's faster backends take at inference",
        """0 loses a little less at 2 bits (hqq's authors), and while it is loaded takes 14 bytes more of GPU memory per
        weight of the largest matrix""",
    )
    hqq_optimize: bool = option(
        True,
        "Let hqq's optimizer fit each group's zero to the weights, in up to 20 steps for each matrix.",
        "it is what HQQ has over rounding to the nearest code, and hqq's default",
        "loading takes longer, and 2 bytes of GPU memory more per weight of the largest matrix",
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
    base_cache: str | None = option(
        "auto",
        """Folder where a base that was quantized is kept, for the next start of any run over the same files: it reads
        the 4-bit bytes, each checked, and quantizes nothing. auto: fsdp_qlora/base in the user's cache folder, for
        bases of 1 GiB and more, where that folder is on a disk of this machine: not on a network mount, nor in memory.
        null: none. An entry that no run has used for 30 days is removed by the next start that uses this folder, and
        said. No unit is written that would fill the disk beyond 90 %, with what the run's checkpoints will take, and
        takes over 1 % of what is free; what other programs write meanwhile is not foreseen. `python -m fsdp_qlora cache
        list` shows the entries.""",
        "a model is quantized once, and a quarter of its bytes is read from then on",
        "its bytes on the disk: 35 GB at 70B; the first start writes them while it loads",
        is_path=True,
        aliases={"true": "auto"},
        refused={"false": "no cache is --base_cache null"},
        known_as=("quantized_cache", "quantize_cache", "weights_cache"),
    )
    loading_workers: int = option(
        -1,
        "Threads per rank that read the checkpoint ahead of the encoder, or a base from base_cache.",
        "it follows the machine's cores",
        "each brings about one tensor into the system's file cache",
        unit="threads",
        at_least=1,
        special={-1: "automatic"},
    )
