"""Options of fsdp_qlora that accept one value only: recognised in command lines, in no group and not in --help."""

from dataclasses import dataclass

from fsdp_qlora.config.option import NOT_BUILT, Option, option, options_of


def _refuse_llama_pro(_: str) -> None:
    raise ValueError(f"block expansion (Llama-Pro) {NOT_BUILT}; omit it")


@dataclass
class _CompatibilityOptions:
    """The table: one field for each, read like any option; its value reaches no Config."""

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
