"""Rules between options: which need another to have any effect, and which contradict each other."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fsdp_qlora.config.columns import FIELDS, are_columns
from fsdp_qlora.config.compat import COMPATIBILITY
from fsdp_qlora.config.log_targets import readers
from fsdp_qlora.config.options import Config
from fsdp_qlora.config.program import Conflict, Needs, broken, unmet
from fsdp_qlora.config.train_types import TRAIN_TYPES


def _is_read(option: str, config: Config) -> bool:
    """Return whether a logger that `log_to` names reads `option`."""
    return bool({*readers(option)} & {*config.output.log_to})


def _codec(config: Config) -> str:
    return TRAIN_TYPES[config.model.train_type].codec


NEEDS: tuple[Needs[Config], ...] = (
    Needs(("plan_for",), "plan_only", lambda c: c.memory.plan_only, "set plan_only to true"),
    Needs(("link_gbps",), "plan_for", lambda c: c.memory.plan_for is not None, "set plan_for to a rig, as 2x4090"),
    Needs(("double_quant",), "train_type", lambda c: _codec(c) == "nf4", "set train_type to qlora or bnb_dora"),
    Needs(
        ("n_bits",),
        "train_type",
        lambda c: _codec(c) in ("nf4", "hqq"),
        "set train_type to qlora or hqq_lora",
    ),
    Needs(
        ("hqq_group_size", "hqq_axis", "hqq_optimize"),
        "train_type",
        lambda c: _codec(c) == "hqq",
        "set train_type to hqq_lora or hqq_dora",
    ),
    Needs(("base_cache",), "dummy_weights", lambda c: not c.model.dummy_weights, "set dummy_weights to false"),
    Needs(("base_cache",), "train_type", lambda c: _codec(c) != "plain", "set train_type to qlora or hqq_lora"),
    Needs(("revision",), "model_name", lambda c: not Path(c.model.model_name).is_dir(), "set model_name to a hub id"),
    Needs(
        ("warmup_ratio",),
        "lr_scheduler",
        lambda c: c.training.lr_scheduler != "constant",
        "set lr_scheduler to cosine or linear",
    ),
    Needs(
        ("grad_norm",),
        "apply_gradient_clipping",
        lambda c: c.training.apply_gradient_clipping,
        "set apply_gradient_clipping to true",
    ),
    Needs(
        ("hybrid_shard_size",),
        "sharding_strategy",
        lambda c: c.memory.sharding_strategy.startswith("hybrid_"),
        "set sharding_strategy to hybrid_full_shard or hybrid_shard_grad_op",
    ),
    Needs(
        ("cpu_offload_by",),
        "use_cpu_offload",
        lambda c: c.memory.use_cpu_offload is True,
        "set use_cpu_offload to true",
    ),
    Needs(
        ("resident_blocks",),
        "use_cpu_offload",
        lambda c: c.memory.use_cpu_offload is True,
        "set use_cpu_offload to true",
    ),
    Needs(
        ("resident_blocks",),
        "cpu_offload_by",
        lambda c: c.memory.cpu_offload_by == "stream",
        "set cpu_offload_by to stream",
    ),
    Needs(
        ("reentrant_checkpointing",),
        "use_gradient_checkpointing",
        lambda c: c.memory.use_gradient_checkpointing,
        "set use_gradient_checkpointing to true",
    ),
    Needs(
        ("keep_activations",),
        "use_gradient_checkpointing",
        lambda c: c.memory.use_gradient_checkpointing,
        "set use_gradient_checkpointing to true",
    ),
    Needs(("use_activation_cpu_offload",), "fused", lambda c: c.model.fused != "false", "set fused to auto or true"),
    Needs(("dummy_row_tokens",), "dataset", lambda c: c.data.dataset == "dummy", "set dataset to dummy"),
    Needs(
        ("packing",),
        "dummy_row_tokens",
        lambda c: c.data.dataset != "dummy" or c.data.dummy_row_tokens is not None,
        "set it, as dummy rows fill the context without",
    ),
    Needs(("packing",), "fused", lambda c: c.model.fused != "false", "set fused to auto or true"),
    Needs(("keep_activations",), "fused", lambda c: c.model.fused != "false", "set fused to auto or true"),
    Needs(
        ("no_sync",),
        "gradient_accumulation_steps",
        lambda c: c.training.gradient_accumulation_steps > 1,
        "set gradient_accumulation_steps above 1",
    ),
    Needs(
        (
            "dataset_format",
            "columns",
            "prompt_template",
            "chat_template",
            "text_overflow",
            "bad_rows",
            "rows_cache",
            "train_on_prompt",
        ),
        "dataset",
        lambda c: c.data.dataset != "dummy",
        "set dataset to one with rows",
    ),
    Needs(
        ("dataset_format", "chat_template", "text_overflow"),
        "prompt_template",
        lambda c: c.data.prompt_template is None,
        "omit prompt_template",
    ),
    Needs(
        ("save_total_limit",),
        "save_steps",
        lambda c: c.output.makes_checkpoints,
        "set save_steps to a number of steps",
    ),
    Needs(
        ("eval_steps", "eval_on_start", "eval_generate", "save_best", "early_stopping_patience"),
        "eval_dataset",
        lambda c: c.evaluation.has_rows,
        "set eval_dataset, eval_fraction or eval_samples",
    ),
    Needs(
        ("save_best", "early_stopping_patience"),
        "eval_steps",
        lambda c: c.evaluation.eval_steps != -1,
        "set eval_steps to 0 or above",
    ),
    Needs(
        ("eval_generate_tokens",),
        "eval_generate",
        lambda c: c.evaluation.eval_generate > 0,
        "set eval_generate to a number of rows",
    ),
    Needs(("save_best",), "save_model", lambda c: c.output.save_model, "set save_model to true"),
    *(
        Needs((name,), "log_to", partial(_is_read, name), f"add {' or '.join(readers(name))} to log_to")
        for name in ("project_name", "name", "group", "entity")
    ),
    Needs(
        (
            "profiling_output",
            "with_stack",
            "with_shapes",
            "profile_memory",
            "export_trace",
            "export_memory_timeline",
        ),
        "profile",
        lambda c: c.profile.profile,
        "set profile to true",
    ),
)

CONFLICTS: tuple[Conflict[Config], ...] = (
    Conflict(
        ("columns",),
        lambda c: not are_columns(c.data.columns or []),
        f"write FIELD=COLUMN,..., each field and each column once; fields are {', '.join(FIELDS)}",
    ),
    Conflict(
        ("n_bits", "train_type"),
        lambda c: _codec(c) == "nf4" and c.model.n_bits not in (None, 4),
        "NF4 has 4 bits; set train_type to hqq_lora for another width, or omit n_bits",
    ),
    Conflict(
        ("use_cpu_offload", "sharding_strategy"),
        lambda c: c.memory.use_cpu_offload is True and c.memory.sharding_strategy == "ddp",
        "ddp keeps the whole model on every GPU, so nothing is offloaded; take full_shard, or drop use_cpu_offload",
    ),
    Conflict(
        ("use_cpu_offload", "sharding_strategy"),
        lambda c: (
            c.memory.use_cpu_offload is True
            and c.memory.cpu_offload_by == "stream"
            and c.memory.sharding_strategy not in ("auto", "full_shard", "ddp")
        ),
        "blocks streamed from the node's one copy are never gathered; take auto or full_shard, or cpu_offload_by fsdp2",
    ),
    Conflict(
        ("hybrid_shard_size", "world_size"),
        lambda c: (
            c.launch.world_size > 0
            and c.memory.hybrid_shard_size > 0
            and c.launch.world_size % c.memory.hybrid_shard_size != 0
        ),
        "world_size must be a multiple of hybrid_shard_size; change one of them",
    ),
    Conflict(
        ("deterministic", "batch_size"),
        lambda c: c.training.deterministic and c.training.batch_size == -1,
        "the plan chooses the micro-batch by what it measures, and sums of other rows have other bits; set batch_size",
    ),
    Conflict(
        ("attention", "precision"),
        lambda c: c.model.attention == "flash_attention_2" and c.model.precision == "fp32",
        "flash-attn computes in 16 bits only; take another precision, or attention auto or sdpa",
    ),
    Conflict(
        ("eval_dataset", "eval_fraction"),
        lambda c: c.evaluation.eval_dataset is not None and c.evaluation.eval_fraction is not None,
        "one brings other rows, the other holds training rows out; give one of them",
    ),
    Conflict(
        ("eval_fraction", "eval_samples"),
        lambda c: c.evaluation.eval_fraction is not None and c.evaluation.eval_samples is not None,
        "both say how many training rows to hold out; give one of them",
    ),
    Conflict(
        ("dataset", "eval_dataset"),
        lambda c: c.evaluation.eval_dataset is not None and "dummy" in (c.data.dataset, c.evaluation.eval_dataset),
        "dummy rows are random; hold some of them out with eval_fraction or eval_samples, or give real rows to both",
    ),
    Conflict(
        ("lora_target_modules",),
        lambda c: "all" in c.adapter.lora_target_modules and len(c.adapter.lora_target_modules) > 1,
        "all already includes every other name; give all alone, or the names without it",
    ),
)


def without_effect(config: Config) -> dict[str, Needs[Config]]:
    """Return {option: the rule} of options that do nothing in `config` and ask for something (not false, not null)."""
    return unmet(config, _values(config), NEEDS)


def broken_rules(
    config: Config, given: Collection[str], unknown: Collection[str], written: Callable[[str], str]
) -> Iterator[str]:
    """Yield one line for each broken rule, as `Program.rules` does."""
    yield from broken(config, _values(config), NEEDS, CONFLICTS, given, unknown, written)


def _values(config: Config) -> dict[str, Any]:
    return config.to_flat() | {name: option.default for name, option in COMPATIBILITY.items()}
