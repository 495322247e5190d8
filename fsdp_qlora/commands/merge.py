"""The command merge: an adapter into its base, saved as a Hugging Face model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fsdp_qlora.commands.base import Command, ready_for_hub
from fsdp_qlora.config.options import REQUIRED, Needs, command, option
from fsdp_qlora.config.train_types import TRAIN_TYPES


@dataclass
class BaseOptions:
    """An adapter and the base that it belongs to: what several commands take."""

    adapter: str = option(
        REQUIRED,
        "Folder of the adapter: the output_dir of a run, or an adapter that PEFT saved.",
        "",
        is_path=True,
        known_as=("adapter_name_or_path", "adapter_path", "peft_model", "lora_model_dir", "lora"),
    )
    merge_base: Literal["trained", "original"] = option(
        "trained",
        """The base that the adapter is added to. trained: the one it was trained over, with qlora the dequantized 4-bit
        weights. original: the checkpoint's 16-bit weights.""",
        "the adapter has learnt to correct this base's quantization too; merged, it then answers as in training",
        "original may answer better or worse than base + adapter did in training: compare on rows of your own",
    )
    model_name: str | None = option(
        None,
        "The base, a hub id or a local folder, where it is not the one that the adapter's folder names.",
        "the adapter's folder says what it was trained over",
        is_path=True,
        known_as=("model", "model_name_or_path", "base_model", "model_id"),
    )
    revision: str | None = option(
        None,
        "Branch, tag or commit of a hub model.",
        "the one that the adapter's folder names, else the hub's main branch",
        known_as=("model_revision",),
    )
    train_type: str | None = option(
        None,
        "How the base was stored while the adapter trained, of an adapter without config.yaml: as of train.py.",
        "an adapter of train.py has it in its config.yaml",
        choices=tuple(TRAIN_TYPES),
    )
    double_quant: bool | None = option(
        None,
        "Whether the 4-bit base's scales were quantized too, of an adapter without config.yaml.",
        "an adapter of train.py has it in its config.yaml",
        known_as=("bnb_4bit_use_double_quant", "use_double_quant"),
    )
    precision: str | None = option(
        None,
        "The floating point types of the training, of an adapter without config.yaml: as of train.py.",
        "an adapter of train.py has it in its config.yaml",
        choices=("fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"),
    )

    def recorded(self) -> dict[str, Any]:
        """Return what the adapter's folder says too, as the user named it."""
        names = ("model_name", "revision", "train_type", "double_quant", "precision")
        return {name: getattr(self, name) for name in names}


@dataclass
class MergeOptions(BaseOptions):
    """Merge: which adapter, into which base, saved how."""

    output_dir: str = option(
        "merged",
        "Folder for the merged model: config.json, safetensors, tokenizer, and merge.json on how it was made.",
        "under the current folder",
        "2 bytes a parameter: 140 GB at 70B",
        is_path=True,
    )
    overwrite_output_dir: bool = option(
        False,
        "Write into an output_dir that is not empty.",
        "an earlier model is not lost by accident; an unfinished merge is gone on with all the same",
        "files of the same name are replaced",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "Dtype of the merged weights. auto: the one that training multiplied in.",
        "it holds the trained base exactly; only the sum with the adapter is rounded, once",
        "fp32 takes twice the space and rounds nothing; fp16 has finer steps than bf16 and ends at 65504",
        aliases={"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
        known_as=("torch_dtype", "save_dtype", "merge_dtype"),
    )
    max_shard_gb: float = option(
        5.0,
        "Largest file of the merged model.",
        "a merge that is interrupted repeats at most one file",
        unit="GB",
        above=0,
        known_as=("max_shard_size", "export_size"),
    )
    check_rows: int = option(
        4,
        """Rows on which the logits of the merged model are compared with those of base + adapter, of the training's
        dataset where that is a local file. 0: no comparison.""",
        "what merging changed is said before anyone serves the model",
        "it reads and multiplies all weights once more, one linear at a time; minutes at 70B without a GPU",
        unit="rows",
        at_least=0,
        at_most=64,
    )


NEEDS = (
    Needs[MergeOptions](
        ("double_quant",),
        "train_type",
        lambda asked: asked.train_type is None or TRAIN_TYPES[asked.train_type].is_nf4,
        "set train_type to one over NF4, as qlora",
    ),
)


def run(asked: MergeOptions) -> None:
    """Merge, then say what rounding and merging changed."""
    ready_for_hub(asked.adapter, asked.model_name)
    from fsdp_qlora.export.merge import Wanted, merge_and_check  # torch takes seconds to import

    wanted = Wanted(Path(asked.output_dir), asked.dtype, asked.overwrite_output_dir, int(asked.max_shard_gb * 1e9))
    merge_and_check(Path(asked.adapter), asked.recorded(), asked.merge_base, wanted, asked.check_rows)


MERGE = Command(
    "an adapter into its base, saved as a Hugging Face model",
    command(
        "python -m fsdp_qlora merge --adapter FOLDER [--output_dir FOLDER] [--option value ...]",
        """Adds an adapter to the weights of its base and saves the sum as a Hugging Face model that any program opens.
        It works tensor by tensor, so a 70B model needs a few GB of memory, and goes on where it was interrupted.""",
        MergeOptions,
        NEEDS,
    ),
    run,
    interrupted="whole files stay, and the same command makes the rest",
)
