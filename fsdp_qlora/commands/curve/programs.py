"""The programs that make a point, as command lines that a user can repeat, and as child processes."""

import ctypes
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import fsdp_qlora
from fsdp_qlora.commands.answering import COMPUTED, READ
from fsdp_qlora.commands.curve.options import CurveOptions
from fsdp_qlora.commands.evaluate import EVALUATE
from fsdp_qlora.config.options import Config, Program, show
from fsdp_qlora.config.parse import TRAIN
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import UserError

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the one that started it ends


def train_script() -> Path:
    """Return where train.py is. Raises UserError where the package is installed without it."""
    script = Path(fsdp_qlora.__file__).resolve().parents[1] / "train.py"
    if not script.is_file():
        raise UserError(f"curve: {script} is missing, as in a package that was not installed from a clone with -e")
    return script


def training(train: Config, rows: int, folder: Path, ranks: int, more: dict[str, Any]) -> list[str]:
    """Return the command line that trains a point. more: options on top of the user's."""
    script = train_script()
    here = Path.cwd()
    shown = script.relative_to(here) if script.is_relative_to(here) else script
    values = train.to_flat() | {"dataset_samples": rows, "output_dir": str(folder), "overwrite_output_dir": False}
    return [*_launcher(ranks), str(shown), *flags(values | more, TRAIN)]


def measuring(own: CurveOptions, train: Config, rows: int, folder: Path, ranks: int) -> list[str]:
    """Return the command line that measures a point; of 0 rows the base alone."""
    model, values = train.model, train.to_flat()
    given: dict[str, Any] = {"dataset": own.eval_dataset, "output_dir": str(folder), "measures": own.measures}
    if rows:
        given |= {"adapter": str(folder), "base_too": False}
    else:
        given |= {name: values[name] for name in ("model_name", "revision", "train_type", "precision")}
        given |= {"double_quant": model.double_quant} if TRAIN_TYPES[model.train_type].is_nf4 else {}
    given |= {name: values[name] for name in (*COMPUTED, *READ, "gpu_memory_gib", "host_memory_gib")}
    given |= {"dataset_samples": train.evaluation.eval_samples}
    given |= {"context_length": train.data.context_length} if {"auto", "loss"} & {*own.measures} else {}
    given |= {"max_new_tokens": own.max_new_tokens, "normalize": own.normalize, "batch_size": own.answer_batch_size}
    return [*_launcher(ranks), "-m", "fsdp_qlora", "evaluate", *flags(given, EVALUATE.program)]


def checking(own: CurveOptions, train: Config, folder: Path, ranks: int) -> list[str]:
    """Return the command line by which evaluate looks at its rows and options, with the base alone, and stops."""
    return [*measuring(own, train, 0, folder, ranks), "--plan_only", "true"]


def flags(values: dict[str, Any], program: Program[Any]) -> list[str]:
    """Return the flags that give options these values; those that have them anyway are left out."""
    words = list[str]()
    for name, value in values.items():
        if value != program.options[name].default:
            text = show(value)
            words += [f"--{name}={text}"] if text.startswith("--") else [f"--{name}", text]
    return words


def as_typed(command: Collection[str]) -> str:
    """Return a command line for a shell, torchrun and python under the names that users know."""
    text = shlex.join(command)
    long = shlex.join([sys.executable, "-m", "torch.distributed.run"])
    return text.replace(long, "torchrun", 1).replace(shlex.quote(sys.executable), "python", 1)


def run_program(command: list[str]) -> int:
    """Run a program to its end and return its exit code. Raises KeyboardInterrupt where a signal ended this one.

    The signals of PASSED_ON go to the program, which saves what it has; it is in a group of its own, so that it gets
    each once. Should this process be killed, it gets SIGTERM."""
    sys.stdout.flush()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, process_group=0,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )  # fmt: skip
    with _passing_on(process) as passed:
        code = process.wait()
    if passed:
        raise KeyboardInterrupt
    return code


@contextmanager
def _passing_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Pass signals on to a process meanwhile; yields the list of those that came."""
    passed: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        process.send_signal(number)  # does nothing where it has ended

    wanted = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launcher(ranks: int) -> list[str]:
    alone = [sys.executable]
    return alone if ranks == 1 else [*alone, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def _end_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
