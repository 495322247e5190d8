"""Several nodes played on this machine: a torchrun for each, which meet on the loopback."""

import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.torchrun import finish, start_torchrun


def start_nodes(
    script: str | Path,
    ranks: Sequence[int],
    args: Sequence[Sequence[str]],
    env: Mapping[str, str | None] | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts a torchrun for each node and returns at once. ranks: of each node. args: of the script, on each node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = [f"--nnodes={len(ranks)}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [
        start_torchrun(script, count, args[node], env, launch=[*meeting, f"--node_rank={node}"])
        for node, count in enumerate(ranks)
    ]


def run_nodes(
    script: str | Path,
    ranks: Sequence[int],
    args: Sequence[Sequence[str]],
    env: Mapping[str, str | None] | None = None,
    timeout: float = 120,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a script on several nodes to its end, whatever the exit codes."""
    return [finish(node, timeout) for node in start_nodes(script, ranks, args, env)]
