"""Starts several ranks from a test: one launch costs seconds, so put many cases in one script."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
_SCRIPTS = tempfile.TemporaryDirectory(prefix="fsdp_qlora_ranks_")  # gone with the process


def start_torchrun(
    script: str | Path, nproc: int = 2, args: Sequence[str] = (), env: Mapping[str, str | None] | None = None
) -> subprocess.Popen[str]:
    """Starts torchrun and returns at once; stdout and stderr are pipes of text. The caller must end it.

    Ranks that write at the same time keep whole lines with sys.stdout.write("...\\n"): torchrun runs Python unbuffered,
    where print writes the text and its end apart.
    script: a path, or the text of a script (dedented). env: variables to add, None to remove one."""
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
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in (env or {}).items():
        if value is None:
            environ.pop(name, None)
        else:
            environ[name] = value
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
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
    that shows what it had printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun forwards it: its ranks are in sessions of their own
        try:
            out, err = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        raise AssertionError(f"torchrun was still running after {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_torchrun(
    script: str | Path,
    nproc: int = 2,
    args: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Runs a script (path or text) on `nproc` ranks to its end, whatever its exit code; `.stdout`, `.stderr`,
    `.returncode` say what happened.

    Skips on a machine whose GPUs are too few for a rank each."""
    if 0 < torch.cuda.device_count() < nproc and (env or {}).get("CUDA_VISIBLE_DEVICES") != "":
        pytest.skip(f"{nproc} ranks need as many GPUs, or none")
    return finish(start_torchrun(script, nproc, args, env), timeout)
