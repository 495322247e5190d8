"""Commands for before and after training: `python -m fsdp_qlora merge --adapter output ...` (or `fsdp-qlora merge`).

This file is the door, as train.py is for training: it reads the options, so that a mistake is told before PyTorch is
imported, and turns how a command ended into one line and an exit code: 0, 2 for a mistake of the user's, 1 for work
that stopped in the middle, 130 for Ctrl-C and SIGTERM.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from fsdp_qlora.commands.table import COMMANDS
from fsdp_qlora.config.help import help_text
from fsdp_qlora.config.parse import parse_as, wants_help
from fsdp_qlora.errors import RunEnded, UserError
from fsdp_qlora.runtime.launcher import (
    choose_allocator,
    keep_cpu_products_inside,
    local_rank_from_environment,
    rank_from_environment,
    read_launch,
)
from fsdp_qlora.runtime.libraries import leave_out_compiler, silence
from fsdp_qlora.runtime.terminal import prepare_streams, print_to_pager

HEAD_START_SECONDS = 2.0
INTERRUPTED = 130  # exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name in ("-h", "--help"):
        _show(_overview())
        return 0
    if name not in COMMANDS:
        wrong = f"{name}: there is no such command" if name else "a command is missing"
        return _tell("fsdp_qlora", UserError(f"{wrong}; give one of {', '.join(COMMANDS)}, or --help"))
    command = COMMANDS[name]
    if wants_help(rest):
        _show(help_text(program=command.program))
        return 0
    try:
        try:
            asked = parse_as(command.program, rest)
        except UserError as error:
            raise error.on_every_rank(local_rank_from_environment()) from None  # a node's own command line
        if read_launch().size > 1 and not command.ranks:
            raise UserError(f"{name} runs in one process: start it without torchrun")
        silence()
        leave_out_compiler()
        if command.ranks:
            choose_allocator()
        keep_cpu_products_inside()
        command.run(asked)
    except RunEnded as ended:
        return _tell(name, ended)
    except KeyboardInterrupt:
        if rank_from_environment() == 0:
            print(f"{name}: interrupted; {command.interrupted}", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def entry() -> int:
    """Run the command of this process's arguments, as the console script does. Returns the exit code."""
    prepare_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    code = main()
    # Threads of the process group may still hold tensors, as in train.py; and an interrupted download waits for nobody.
    if code == INTERRUPTED or read_launch().size > 1:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m fsdp_qlora COMMAND [--option value ...]",
            "",
            *lines,
            "",
            "COMMAND --help lists its options.",
        ]
    )


def _tell(name: str, ended: RunEnded) -> int:
    if ended.told_elsewhere:  # torchrun ends all ranks with the first that ends: the one that tells gets a head start
        with suppress(KeyboardInterrupt):  # torchrun ends this rank meanwhile
            time.sleep(HEAD_START_SECONDS)
    else:
        sys.stderr.write(f"{name}: {ended}\n")
        sys.stderr.flush()
    return 2 if isinstance(ended, UserError) else 1


def _show(text: str) -> None:
    if rank_from_environment() == 0:
        print_to_pager(text)


if __name__ == "__main__":
    sys.exit(entry())
