"""Fine-tune a model with LoRA over a frozen 4-bit base: `torchrun --nproc_per_node 2 train.py --model_name ...`.

This file is the door: it reads the options, so that a mistake is told before PyTorch is even imported, runs the run
(`fsdp_qlora/run.py`, one line per stage) and turns how it ended into one line and an exit code: 0, 2 for a mistake of
the user's, 1 for a run that stopped in the middle, 130 and 143 for one that a signal ended.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from fsdp_qlora.config.help import help_text
from fsdp_qlora.config.options import Config
from fsdp_qlora.config.parse import parse, wants_help
from fsdp_qlora.data.sources import is_local
from fsdp_qlora.errors import RunEnded, UserError
from fsdp_qlora.runtime.launcher import (
    choose_allocator,
    keep_cpu_products_inside,
    local_rank_from_environment,
    make_libraries_repeatable,
    rank_from_environment,
)
from fsdp_qlora.runtime.libraries import go_offline_if_unreachable, leave_out_compiler, silence
from fsdp_qlora.runtime.terminal import prepare_streams, print_to_pager

# Torchrun ends all ranks as soon as one has ended, so the one that tells the user what is wrong gets a head start.
HEAD_START_SECONDS = 2.0


def main(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        if rank_from_environment() == 0:
            print_to_pager(help_text())
        return 0
    try:
        config = parse(arguments)
        if config.training.deterministic:
            make_libraries_repeatable()
    except UserError as error:
        return _tell(error.on_every_rank(local_rank_from_environment()))  # a node's own command line
    silence()
    leave_out_compiler()
    choose_allocator()
    keep_cpu_products_inside()
    try:
        unreachable = go_offline_if_unreachable() if needs_hub(config) else None
        notes = [unreachable] if unreachable else []
        if config.memory.plan_for is not None:
            from fsdp_qlora.rig_plan import plan_for_rig

            return plan_for_rig(config, notes)
        from fsdp_qlora.run import run  # seconds of imports, which a typo in an option must not wait for

        return run(config, notes)
    except RunEnded as ended:
        return _tell(ended)
    except KeyboardInterrupt:
        if rank_from_environment() == 0:
            print("train.py: interrupted, nothing more was saved", file=sys.stderr, flush=True)
        return 130


def needs_hub(config: Config) -> bool:
    """Whether anything that the run reads may be on the hub rather than on this machine."""
    no_rows = config.memory.plan_only and not config.data.show_rows
    datasets = [] if no_rows else [config.data.dataset, config.evaluation.eval_dataset]
    return not Path(config.model.model_name).is_dir() or not all(is_local(d) for d in datasets if d is not None)


def _tell(ended: RunEnded) -> int:
    """Say it, or let another rank say it; the exit code."""
    if ended.told_elsewhere:
        time.sleep(HEAD_START_SECONDS)
    else:
        sys.stderr.write(f"train.py: {ended}\n")  # one write: print makes two where torchrun runs Python unbuffered
        sys.stderr.flush()
    return 2 if isinstance(ended, UserError) else 1


def _leave(code: int) -> NoReturn:
    """Ends the process, all that it had to do being done. An interpreter that takes itself apart while a thread of the
    process group still gives a tensor back to it aborts: seen as exit code -6 of a rank that had trained to its end."""
    with suppress(OSError):  # a reader that has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    prepare_streams()
    _leave(main(sys.argv[1:]))
