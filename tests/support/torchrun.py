"""Starts several ranks from a test: one launch costs seconds, so put many cases in one script."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_SCRIPTS = tempfile.TemporaryDirectory(prefix="fsdp_qlora_ranks_")  # gone with the process


def start_torchrun(
    script: str | Path,
    nproc: int = 2,
    args: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
    launch: Sequence[str] = ("--standalone",),
) -> subprocess.Popen[str]:
    """Starts torchrun and returns at once; stdout and stderr are pipes of text. The caller must end it.

    Ranks that write at the same time keep whole lines with sys.stdout.write("...\\n"): torchrun runs Python unbuffered,
    where print writes the text and its end apart.
    script: a path, or the text of a script (dedented). env: variables to add, None to remove one. launch: options of
    torchrun's own."""
    if isinstance(script, str) and "\n" in script:
        with tempfile.NamedTemporaryFile("w", suffix=".py", dir=_SCRIPTS.name, delete=False) as file:
            file.write(textwrap.dedent(script))
        script = file.name
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC_", "SLURM_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name, None)
    environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONFAULTHANDLER": "1",  # for `stacks`
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in (env or {}).items():
        if value is None:
            environ.pop(name, None)
        else:
            environ[name] = value
    command = [sys.executable, "-m", "torch.distributed.run", *launch, f"--nproc_per_node={nproc}"]
    return subprocess.Popen(
        [*command, str(script), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environ,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Waits for a started torchrun. One that outlives `timeout` seconds is ended, its ranks too, and is an error
    that shows what it had printed and where each rank was; so is one at which the tests are interrupted."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"torchrun was still running after {timeout} s\n{stacks(process)}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"while torchrun was running\n{stacks(process)}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Rank -> its process, of a running torchrun."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children(recursive=True):  # parents before their own children
        with suppress(psutil.Error):
            environ = child.environ()
            if "RANK" in environ:
                found.setdefault(int(environ["RANK"]), child)
    return dict(sorted(found.items()))


def stacks(process: subprocess.Popen[str], seconds: float = 5) -> str:
    """Ends a torchrun and its ranks; what they had printed, ranks' Python stacks (every thread's) at the end of it.

    A rank that waits inside NCCL or CUDA shows them too. One after the other, each given `seconds`."""
    try:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP)  # or it would end the others when the first is gone
            ranks = ranks_of(process)
            family = psutil.Process(process.pid).children(recursive=True)
            for rank in ranks.values():
                with suppress(psutil.Error):
                    rank.rlimit(psutil.RLIMIT_CORE, (0, 0))
                    rank.send_signal(signal.SIGABRT)  # at which faulthandler writes
                    late = time.monotonic() + seconds
                    while rank.status() != psutil.STATUS_ZOMBIE and time.monotonic() < late:
                        time.sleep(0.02)
            for one in family:
                with suppress(psutil.Error):
                    one.kill()
    finally:
        process.kill()
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as held:  # somebody else holds the pipes
        out, err = ((text or b"").decode(errors="replace") for text in (held.stdout, held.stderr))
    return f"{out}\n{err}"


def run_torchrun(
    script: str | Path,
    nproc: int = 2,
    args: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
    timeout: float = 120,
    launch: Sequence[str] = ("--standalone",),
) -> subprocess.CompletedProcess[str]:
    """Runs a script (path or text) on `nproc` ranks to its end, whatever its exit code; `.stdout`, `.stderr`,
    `.returncode` say what happened.

    Skips on a machine whose GPUs are too few for a rank each."""
    if 0 < torch.cuda.device_count() < nproc and (env or {}).get("CUDA_VISIBLE_DEVICES") != "":
        pytest.skip(f"{nproc} ranks need as many GPUs, or none")
    return finish(start_torchrun(script, nproc, args, env, launch), timeout)
