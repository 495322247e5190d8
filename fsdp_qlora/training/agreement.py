"""Whether a checkpoint is this run's: what must agree for the run to go on to the same bits, and what may differ."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from fsdp_qlora.config.options import OPTIONS, Config, show
from fsdp_qlora.data.batches import Batches
from fsdp_qlora.errors import UserError
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.optim.optimizers import OPTIMIZERS
from fsdp_qlora.training.checkpoint_folder import Checkpoint
from fsdp_qlora.units import count_of

DECISIVE = ("model", "adapter", "data", "training")  # groups whose options must be those of the checkpoint's run
# Except for these. What is compared of the base and of the rows is their bytes: they may have other names by now.
COMPARED_BY_BYTES = (
    "model_name", "revision", "dummy_weights", "dataset", "dataset_format", "columns", "prompt_template",
    "chat_template", "dataset_samples", "context_length", "text_overflow", "bad_rows", "train_on_prompt",
)  # fmt: skip
HELD_OUT = ("eval_dataset", "eval_fraction", "eval_samples")  # of which some hold training rows out
COMPARED_BY_ROWS = ("batch_size", "gradient_accumulation_steps")  # and ranks: of one step
ROUNDING = ("attention", "fused", "deterministic")  # that change the last bits of a step at most
FROM_HERE_ON = (
    "num_epochs", "max_steps", "lr", "lr_scheduler", "warmup_ratio", "wd", "apply_gradient_clipping", "grad_norm",
)  # fmt: skip
LEFT_OPEN = ("n_bits", "hqq_group_size", "hqq_axis")  # of which null is any: the base's bytes are compared
NO_MATTER = ("base_cache", "loading_workers", "show_rows", "rows_cache")
MAY_DIFFER = {*COMPARED_BY_BYTES, *COMPARED_BY_ROWS, *ROUNDING, *FROM_HERE_ON, *NO_MATTER}
ANEW = "or start anew in another output_dir, without --resume"


def check_options(checkpoint: Checkpoint, config: Config, ranks: int) -> None:
    """Raise UserError where the options, or the number of ranks, are not those that the checkpoint needs."""
    manifest, now = checkpoint.manifest, config.to_flat()
    wrong = [
        name
        for name, before in manifest.options.items()
        if name in now and OPTIONS[name].group in DECISIVE and name not in MAY_DIFFER and _differ(name, before, now)
    ]
    if wrong:
        raise UserError(
            f"resume: {checkpoint.path} was made with other options: {differences(wrong, manifest.options, now)}; "
            f"set {'them' if len(wrong) > 1 else 'it'} as before, {ANEW}"
        )
    if manifest.ranks != ranks and OPTIMIZERS[config.training.optimizer].is_blockwise:
        raise UserError(
            f"resume: {checkpoint.path} was made on {count_of(manifest.ranks, 'rank')} and this run has {ranks}: the "
            f"8-bit state of {config.training.optimizer} cannot be cut anew; start {count_of(manifest.ranks, 'rank')}, "
            f"{ANEW}"
        )


def is_same_run(before: Config, now: Config) -> bool:
    """Return whether the options ask for the same training from the beginning, to the last bits."""
    options, differs = before.to_flat(), (*COMPARED_BY_ROWS, *ROUNDING, *NO_MATTER)
    return all(
        not _differ(name, value, options)
        for name, value in now.to_flat().items()
        if (OPTIONS[name].group in DECISIVE and name not in differs) or name in HELD_OUT
    )


def _differ(name: str, before: Any, now: Mapping[str, Any]) -> bool:
    return before != now[name] and not (name in LEFT_OPEN and None in (before, now[name]))


def place_in(batches: Batches) -> dict[str, Any]:
    """Return what must be as it was for step i to have the same rows."""
    return {
        "rows": batches.rows.digest,
        "number_of_rows": len(batches.rows),
        "rows_per_step": batches.rows_per_step,
        "steps_per_epoch": batches.steps_per_epoch,
        "bin_tokens": None if batches.bins is None else batches.bins.capacity,
    }


def check_place(checkpoint: Checkpoint, config: Config, batches: Batches, steps: int) -> None:
    """Raise UserError where step i has other rows than it had, or the run has fewer steps than are done."""
    before, now = checkpoint.manifest.data, place_in(batches)
    if before["rows"] != now["rows"]:
        changed = (
            _changed(COMPARED_BY_BYTES, "data", checkpoint.manifest.options, config),
            _changed(HELD_OUT, "evaluation", checkpoint.manifest.options, config),
        )
        options = ", ".join(filter(None, changed))
        raise UserError(
            f"resume: {checkpoint.path} was made with other rows: {before['number_of_rows']:,} then, "
            f"{now['number_of_rows']:,} now ({options or 'the options are the same, so the dataset has changed'}); "
            f"take the dataset as it was, {ANEW}"
        )
    if before["rows_per_step"] != now["rows_per_step"]:
        raise UserError(
            f"resume: {checkpoint.path} had {before['rows_per_step']} rows in a step and this run has "
            f"{now['rows_per_step']} (batch_size * gradient_accumulation_steps * ranks); change one of these options "
            f"so that it has {before['rows_per_step']}, {ANEW}"
        )
    if before.get("bin_tokens") != now["bin_tokens"]:
        raise UserError(
            f"resume: {checkpoint.path} had rows packed into bins of {before.get('bin_tokens')} tokens and this run "
            f"has bins of {now['bin_tokens']}; set context_length as before, {ANEW}"
        )
    if before["steps_per_epoch"] != now["steps_per_epoch"]:
        raise UserError(
            f"resume: {checkpoint.path} had {before['steps_per_epoch']} steps in an epoch and this run has "
            f"{now['steps_per_epoch']}: other rows share a step; set the options as before, {ANEW}"
        )
    if checkpoint.step > steps:
        raise UserError(
            f"resume: {checkpoint.path} has {checkpoint.step} steps behind it and this run ends after {steps}; raise "
            "num_epochs or max_steps, or resume from an earlier checkpoint"
        )


def base_of(model: CausalModel, device: torch.device) -> dict[str, Any]:
    """Return a checksum of the frozen weights: after they are loaded and before they are first read."""
    sums = [unit.frozen.expected for unit in model.units]
    assert None not in sums, "the frozen weights have been read"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"checksum": sum(number or 0 for number in sums) % 2**64, "device": name}


def check_base(
    checkpoint: Checkpoint,
    config: Config,
    base: Mapping[str, Any],
    adapters: list[list[Any]],
    say: Callable[[str], None],
    cache: str = "",
) -> None:
    """Raise UserError where the frozen weights or the adapters are not those of the checkpoint's run.

    cache: folder of the base cache that frozen weights were read from, '' if all were encoded by this run.
    Where another kind of device encoded the weights, their bytes may differ in the last bits: the user is told."""
    before = checkpoint.manifest
    options = _changed(COMPARED_BY_BYTES, "model", before.options, config)
    why = f" ({options})" if options else ""
    if before.adapters != adapters:
        raise UserError(
            f"resume: {checkpoint.path} has adapters of other linears or shapes than this model{why}; take the model "
            f"as it was, {ANEW}"
        )
    if before.base["checksum"] == base["checksum"]:
        return
    kept = f"; they came from the base cache, {cache}: --base_cache null encodes them anew" if cache else ""
    if before.base["device"] != base["device"]:  # which may sum up the scales of NF4 to other bits
        say(
            f"resume    {checkpoint.path} was made on another device ({before.base['device']}, here {base['device']}): "
            f"the frozen weights are not the same to the bit; that they are the same model is not checked{kept}"
        )
    else:
        raise UserError(
            f"resume: {checkpoint.path} was trained over other frozen weights than {config.model.model_name} has{why}; "
            f"take the model as it was, {ANEW}{kept}"
        )


def _changed(names: Iterable[str], group: str, before: Mapping[str, Any], config: Config) -> str:
    now = config.to_flat()
    changed = [n for n in names if OPTIONS[n].group == group and n in before and before[n] != now[n]]
    return differences(changed, before, now)


def differences(names: Iterable[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {show(now[name])} (was {show(before[name])})" for name in names)
