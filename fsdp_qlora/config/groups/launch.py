"""The options of the group launch: what torchrun is expected to have started."""

from dataclasses import dataclass

from fsdp_qlora.config.option import option


@dataclass
class LaunchOptions:
    """Launch: checked against what torchrun started, never changing it; a mismatch is an error showing the command."""

    world_size: int = option(
        -1,
        "Ranks (processes, one per GPU) that the run must have.",
        "most runs take what was launched",
        unit="ranks",
        at_least=1,
        special={-1: "whatever was launched"},
        known_as=("num_processes", "nproc_per_node", "num_gpus"),
    )
    master_addr: str | None = option(
        None, "Address of the rendezvous host that torchrun must have used.", "it is not checked"
    )
    master_port: int | None = option(
        None,
        "Port of the rendezvous that torchrun must have used.",
        "it is not checked",
        at_least=1,
        at_most=65535,
    )
