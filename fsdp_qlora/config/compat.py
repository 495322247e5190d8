"""Options of fsdp_qlora that accept one value only: recognised in command lines, in no group and not in --help."""

from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.config.option import NOT_BUILT, Option, option, options_of


def _refuse_llama_pro(_: str) -> None:
    raise ValueError(f"block expansion (Llama-Pro) {NOT_BUILT}; omit it")


@dataclass
class _CompatibilityOptions:
    """The table: one field for each, read like any option; its value reaches no Config."""

    n_bits: Literal[4] = option(
        4,
        "Bits per weight of the quantized base.",
        "NF4 keeps 16-bit quality on most tasks; fewer bits do not",
        refused={bits: f"{bits} bits {NOT_BUILT} (needs HQQ); use 4" for bits in (1, 2, 3, 8)},
        known_as=("bits", "load_in_4bit"),
    )
    low_memory: bool = option(
        True,
        "Load block by block, so that no rank ever holds the whole unquantized model.",
        "the only way built: host memory stays at the frozen bytes plus a few blocks",
        refused={False: f"false {NOT_BUILT} and not planned (each rank would load the whole model); leave it true"},
    )
    llama_pro_path: str | None = option(
        None,
        "Checkpoint expanded with new blocks, for the Llama-Pro train types.",
        "no train type reads it yet",
        check=_refuse_llama_pro,
    )


COMPATIBILITY: dict[str, Option] = {item.name: item for item in options_of("compatibility", _CompatibilityOptions)}
