"""The options that generate and evaluate share: what answers, which rows, how tokens are chosen, where memory is."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fsdp_qlora.commands.merge import BaseOptions
from fsdp_qlora.config.columns import are_columns
from fsdp_qlora.config.options import (
    REQUIRED,
    Config,
    Conflict,
    DataOptions,
    MemoryOptions,
    ModelOptions,
    Needs,
    TrainingOptions,
    as_in,
    option,
)
from fsdp_qlora.config.train_types import TRAIN_TYPES

RECORDED = ("model_name", "revision", "train_type", "double_quant", "precision")
COMPUTED = ("attention", "fused", "loading_workers", "base_cache")
PLACED = ("sharding_strategy", "use_cpu_offload", "cpu_offload_by", "resident_blocks", "gpu_memory_gib",
          "host_memory_gib")  # fmt: skip
READ = ("dataset_format", "columns", "prompt_template", "chat_template", "dataset_samples", "bad_rows")


@dataclass
class AnsweringOptions:
    """What answers, what is asked, and with which memory."""

    dataset: str = option(
        REQUIRED,
        """What is asked: rows of any form that train.py takes (docs/rows.md), with or without their answers; a .txt
        file, of which each line is a prompt, a user's turn where the model has a chat template; - for standard input,
        JSON lines or text.""",
        "",
        is_path=True,
        known_as=("data", "prompts", "prompt_file", "input_file", "eval_dataset", "test_file"),
    )
    adapter: str | None = option(
        None,
        """Folder of the adapter: the output_dir of a run, one of its checkpoints, or an adapter that PEFT saved. null:
        the base alone.""",
        "a model without an adapter is given as model_name",
        is_path=True,
        known_as=("adapter_name_or_path", "adapter_path", "peft_model", "lora_model_dir", "lora"),
    )
    model_name: str | None = as_in(BaseOptions, "model_name")
    revision: str | None = as_in(BaseOptions, "revision")
    train_type: str | None = as_in(BaseOptions, "train_type")
    double_quant: bool | None = as_in(BaseOptions, "double_quant")
    precision: str | None = option(
        None,
        "Floating point types to compute in, as of train.py. null: those of the adapter's training, without one bf16.",
        "the adapter has learnt with them",
        "fp32 is many times slower, and has the fewest ties between tokens",
        choices=("fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"),
        aliases={"bfloat16": "bf16", "float32": "fp32"},
        known_as=("dtype", "torch_dtype"),
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = as_in(ModelOptions, "attention")
    fused: Literal["auto", "true", "false"] = as_in(ModelOptions, "fused")
    loading_workers: int = as_in(ModelOptions, "loading_workers")
    base_cache: str | None = as_in(ModelOptions, "base_cache")

    dataset_format: Literal["auto", "alpaca", "prompt_completion", "text", "messages"] = as_in(
        DataOptions, "dataset_format"
    )
    columns: list[str] | None = as_in(DataOptions, "columns")  # noqa: RUF009 (a dataclasses.field)
    prompt_template: str | None = as_in(DataOptions, "prompt_template")
    chat_template: str | None = as_in(DataOptions, "chat_template")
    dataset_samples: int | None = as_in(DataOptions, "dataset_samples")
    bad_rows: Literal["stop", "skip"] = as_in(DataOptions, "bad_rows")

    max_new_tokens: int = option(
        256,
        "Most tokens of an answer; one that has not ended by then is cut.",
        "it holds nearly all answers of instruction models",
        "each token of the longest answer is a pass over all weights",
        unit="tokens",
        at_least=1,
        known_as=("max_tokens", "max_length", "num_predict"),
    )
    batch_size: int = option(
        -1,
        "Rows that a rank answers at a time. A pass over the weights serves all of them.",
        "as many as memory holds and pay, up to 64, and to 256 where the base is not whole on each GPU",
        "keys and values of each row stay in memory; fewer rows are fewer tokens per second",
        unit="rows",
        at_least=1,
        special={-1: "automatic"},
        known_as=("per_device_eval_batch_size", "eval_batch_size", "num_rows"),
    )

    sharding_strategy: Literal["auto", "full_shard", "ddp"] = option(
        "auto",
        """How the ranks divide the base. auto: whole on each where it fits, else divided or streamed. full_shard: each
        keeps 1/ranks of every block and gathers it for each pass. ddp: a whole copy on each.""",
        "what is fastest depends on the cards and the link between them",
        "full_shard moves every block once for each token of the rows in flight",
        known_as=("fsdp", "fsdp_sharding_strategy"),
    )
    use_cpu_offload: bool | None = as_in(MemoryOptions, "use_cpu_offload")
    cpu_offload_by: Literal["stream", "fsdp2"] = as_in(MemoryOptions, "cpu_offload_by")
    resident_blocks: int | None = as_in(MemoryOptions, "resident_blocks")
    gpu_memory_gib: float | None = as_in(MemoryOptions, "gpu_memory_gib")
    host_memory_gib: float | None = as_in(MemoryOptions, "host_memory_gib")
    plan_only: bool = option(
        False,
        "Say how rows are read, where the base would be and how many rows go at a time, then stop: no weight is read.",
        "answers are the usual wish",
        "seconds",
        known_as=("dry_run", "check_only"),
    )

    def recorded(self) -> dict[str, Any]:
        """Return what the adapter's folder says too, as the user named it."""
        return {name: getattr(self, name) for name in RECORDED}

    def config(self, seed: int = 42) -> Config:
        """Return these options as train.py has them; what an adapter says is not known yet."""
        given = {name: getattr(self, name) for name in RECORDED if getattr(self, name) is not None}
        given |= {name: getattr(self, name) for name in COMPUTED}
        model = ModelOptions(**{"model_name": ""} | given)
        memory = MemoryOptions(**{name: getattr(self, name) for name in PLACED}, use_gradient_checkpointing=False)
        data = DataOptions(dataset=self.dataset, **{name: getattr(self, name) for name in READ})
        return Config(model, data=data, memory=memory, training=TrainingOptions(seed=seed))


def sized(config: Config, longest: int) -> Config:
    """Return the options for rows of so many tokens, for which attention is chosen."""
    return replace(config, data=replace(config.data, context_length=longest))


NEEDS: tuple[Needs[Any], ...] = (
    Needs(
        ("double_quant",),
        "train_type",
        lambda a: a.train_type is None or TRAIN_TYPES[a.train_type].is_nf4,
        "set train_type to one over NF4, as qlora",
    ),
    Needs(
        ("revision",),
        "model_name",
        lambda a: a.model_name is None or not Path(a.model_name).is_dir(),
        "set model_name to a hub id",
    ),
    Needs(
        ("cpu_offload_by", "resident_blocks"),
        "use_cpu_offload",
        lambda a: a.use_cpu_offload is True,
        "set use_cpu_offload to true",
    ),
    Needs(("resident_blocks",), "cpu_offload_by", lambda a: a.cpu_offload_by == "stream", "set it to stream"),
    Needs(
        ("dataset_format", "chat_template"),
        "prompt_template",
        lambda a: a.prompt_template is None,
        "omit prompt_template",
    ),
)
CONFLICTS: tuple[Conflict[Any], ...] = (
    Conflict(
        ("adapter", "model_name"),
        lambda a: a.adapter is None and a.model_name is None,
        "there is nothing to ask; set adapter to a run's output_dir, or model_name to a model",
    ),
    Conflict(
        ("columns",),
        lambda a: not are_columns(a.columns or []),
        "write FIELD=COLUMN,..., each field once; docs/rows.md has the fields",
    ),
    Conflict(
        ("use_cpu_offload", "sharding_strategy"),
        lambda a: a.use_cpu_offload is True and a.sharding_strategy == "ddp",
        "ddp keeps the whole model on every GPU, so nothing is offloaded; omit one of them",
    ),
    Conflict(
        ("attention", "precision"),
        lambda a: a.attention == "flash_attention_2" and a.precision == "fp32",
        "flash-attn computes in 16 bits only; take another precision, or attention auto or sdpa",
    ),
    Conflict(
        ("dataset",),
        lambda a: "dummy" in a.dataset.split(","),
        "dummy rows are random tokens, which ask nothing; give rows or a .txt file",
    ),
)
