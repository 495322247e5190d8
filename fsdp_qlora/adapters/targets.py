"""The choice of the linears that get an adapter, by names and patterns as PEFT has them."""

import re
from collections.abc import Iterable

from fsdp_qlora.errors import UserError

# The linears of fsdp_qlora's `--lora_target_modules default`.
DEFAULT_TARGETS = ("k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj")


def choose_targets(wanted: list[str], linears: Iterable[str]) -> list[str]:
    """Return the full names, out of `linears`, that `wanted` selects: `all`, `default`, or names, patterns as in PEFT.

    A name selects the linear of that path or with that ending (`q_proj`, `mlp.up_proj`); anything else is a regular
    expression for the whole path. Raises UserError naming each entry that selects nothing, and the model's linears.
    """
    linears = list(linears)
    wanted = [name for w in wanted for name in (DEFAULT_TARGETS if w == "default" else (w,))]
    if "all" in wanted:
        return linears
    chosen: set[str] = set()
    empty = []
    for want in wanted:
        hits = {name for name in linears if name == want or name.endswith(f".{want}") or _matches(want, name)}
        chosen |= hits
        if not hits:
            empty.append(want)
    if empty:
        raise UserError(
            f"lora_target_modules: {', '.join(empty)} matches no linear of this model; there are: "
            f"{', '.join(leaf_names(linears))} (or all, default, a full path, a regular expression of one)"
        )
    return [name for name in linears if name in chosen]


def leaf_names(linears: Iterable[str]) -> list[str]:
    """Return the last part of each path (`self_attn.q_proj` of any layer -> `q_proj`), each once, in order."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears))


def peft_targets(chosen: list[str], linears: Iterable[str]) -> list[str]:
    """Return adapter_config.json's `target_modules`: leaf names if they select exactly `chosen`, else full paths."""
    leaves = leaf_names(chosen)
    selected = {name for name in linears if name.rsplit(".", 1)[-1] in leaves}
    return leaves if selected == set(chosen) else chosen


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
