"""Runs train.py's main for many command lines in one launch; keeps each rank's exit code and what it printed.

    torchrun --nproc_per_node 2 tests/support/ranks_of_cases.py CASES.json RESULTS

CASES.json: name -> {"arguments": [...], "largest_file": bytes or null}. Writes RESULTS/NAME.RANK.json.
"""

import faulthandler
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import train
from tests.support.meeting import RANK, meet_at

train.HEAD_START_SECONDS = 0.0  # this launch does not end with the first rank that does


def main(cases: Path, results: Path) -> None:
    faulthandler.enable(os.dup(2))  # not what a case's standard error is turned to
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that may not grow is then an error, as on a full disk
    for name, case in json.loads(cases.read_text()).items():
        start = time.monotonic()
        meet_at(name)
        code, out, err = _captured(partial(_run, case["arguments"], case["largest_file"]))
        (results / f"{name}.{RANK}.json").write_text(json.dumps({"code": code, "out": out, "err": err}))
        sys.stdout.write(f"rank {RANK}: {name} ended with {code} after {time.monotonic() - start:.1f} s\n")


def _run(arguments: list[str], largest_file: int | None) -> int:
    try:
        with ExitStack() as full:
            if largest_file is not None:
                _fill_disk(largest_file, full)
            return train.main(arguments)
    except BaseException:
        traceback.print_exc()
        return -1


def _fill_disk(largest_file: int, undo: ExitStack) -> None:
    """What writes to output_dir may make no larger files: nobody else, since the limit is a process's and would be one
    on the memory that ranks and NCCL share and on the kernels that Triton keeps, which lie on no such disk."""
    train.silence()
    from fsdp_qlora import run
    from fsdp_qlora.report import metrics
    from fsdp_qlora.training import loop

    for place, name in [
        (run, "note_run"),
        (metrics.Metrics, "_write"),
        (metrics.Metrics, "close"),
        (loop, "save_adapter_somewhere"),
    ]:
        undo.enter_context(patch.object(place, name, _limited(getattr(place, name), largest_file)))


def _limited(do: Callable[..., Any], largest_file: int) -> Callable[..., Any]:
    def limited(*arguments: Any, **more: Any) -> Any:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
        try:
            return do(*arguments, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


def _captured(do: Callable[[], int]) -> tuple[int, str, str]:
    """What `do` returns and prints, the two streams of the process and not only Python's.

    Through pipes, which a limit on files does not touch."""
    kept, texts, readers = [os.dup(1), os.dup(2)], ["", ""], []
    for stream in (0, 1):
        end, start = os.pipe()
        os.dup2(start, stream + 1)
        os.close(start)
        readers.append(threading.Thread(target=_read_all, args=(end, texts, stream)))
        readers[-1].start()
    try:
        code = do()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        for reader in readers:
            reader.join()
    return code, texts[0], texts[1]


def _read_all(end: int, texts: list[str], place: int) -> None:
    with os.fdopen(end, encoding="utf-8", errors="replace") as pipe:
        texts[place] = pipe.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
