"""The launcher's environment variables about this process; imports nothing heavy, not even torch."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.config.options import LaunchOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.runtime import control_groups

# Workspaces, SIZE in KiB and how many, with which PyTorch counts cuBLAS as deterministic: 32 MiB, and 128 KiB.
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One process's place among the processes of the run, as torchrun told it; alone when nobody did."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int | None = None


def rank_from_environment() -> int:
    """Return this process's rank (0 when started alone), from the launcher's variables; never fails, needs no torch."""
    return _first_number("RANK", "SLURM_PROCID")


def local_rank_from_environment() -> int:
    """Return this process's rank on its node (0 when started alone), as `rank_from_environment` does."""
    return _first_number("LOCAL_RANK", "SLURM_LOCALID")


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Return torchrun's variables as a `Launch`. Raises UserError when they are incomplete, malformed or contradictory,
    and when srun started several processes without torchrun, which would be several unconnected runs."""
    environ = os.environ if environ is None else environ
    present = [name for name in TORCHRUN_VARIABLES if name in environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks.isdecimal() and int(tasks) > 1 and "SLURM_STEP_ID" in environ:
            raise UserError(
                f"srun started {tasks} processes that know nothing of each other: start one task per node and let "
                "torchrun start the ranks (srun --ntasks-per-node=1 torchrun --nproc_per_node=GPUS ... train.py ...)"
            )
        return Launch()
    missing = [name for name in TORCHRUN_VARIABLES if name not in environ]
    if missing:
        raise UserError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}: start with torchrun, which sets all "
            "of them, or unset them to run as one process"
        )
    rank, size, local_rank, local_size, port = (
        _integer(environ, name) for name in TORCHRUN_VARIABLES if "ADDR" not in name
    )
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UserError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} contradict each "
            "other: a rank must be below its size; start with torchrun, which sets them right"
        )
    return Launch(rank, size, local_rank, local_size, environ["MASTER_ADDR"], port)


def check_launch(asked: LaunchOptions, launch: Launch) -> None:
    """Raise UserError, with the torchrun command that would do it, when the options ask for another launch."""
    wrong = []
    if asked.world_size not in (-1, launch.size):
        wrong.append(f"--world_size {asked.world_size}, but {launch.size} rank{'s' * (launch.size > 1)} started")
    if asked.master_addr is not None and launch.address is not None and asked.master_addr != launch.address:
        wrong.append(f"--master_addr {asked.master_addr}, but the launch uses {launch.address}")
    if asked.master_port is not None and launch.port is not None and asked.master_port != launch.port:
        wrong.append(f"--master_port {asked.master_port}, but the launch uses {launch.port}")
    given = {"master_addr": asked.master_addr, "master_port": asked.master_port}
    if launch.address is None:
        alone = [f"--{name} {value}" for name, value in given.items() if value is not None]
        wrong += [f"{' '.join(alone)}, but torchrun has not started this process"] if alone else []
    if not wrong:
        return
    ranks = launch.size if asked.world_size == -1 else asked.world_size
    command = ["torchrun", f"--nproc_per_node={ranks}"]
    if asked.master_addr is not None:
        command.append(f"--master_addr={asked.master_addr}")
    if asked.master_port is not None:
        command.append(f"--master_port={asked.master_port}")
    raise UserError(
        f"{'; '.join(wrong)}: the launcher decides this, so omit the option or start with "
        f"`{' '.join(command)} train.py ...`"
    )


def user_set_omp_threads() -> bool:
    """Return whether OMP_NUM_THREADS is the user's wish. Torchrun sets it to 1 for several ranks when it is unset, so
    the variable alone does not tell; the environment that torchrun itself was started with does."""
    value = os.environ.get("OMP_NUM_THREADS")
    if value is None:
        return False
    if value != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    try:
        launcher = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # not Linux, or the launcher is another user's: torchrun's default is the likelier reason for a 1
        return False
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in launcher.split(b"\0"))


def usable_cores(physical: int | None) -> int:
    """Return the cores that this process may use: affinity and control-group quota counted, hyper-threads not.

    physical: the machine's physical cores, None where unknown."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if physical is not None:
        cores = min(cores, physical)
    return max(1, int(min(cores, control_groups.cores())))


def choose_allocator() -> None:
    """Let GPU memory grow page by page, set before torch is imported, unless the user has set the allocator's ways.

    Tensors that a block keeps lie between others that come and go; in segments of fixed size the holes between them
    cost a tenth of a 24 GiB card at 70B. Not under WSL, whose driver lacks what it takes."""
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ) and "microsoft" not in _kernel():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def allocator_grows() -> bool:
    """Return whether PyTorch was told to let its GPU memory grow page by page."""
    told = (os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return any("expandable_segments:true" in text.lower() for text in told)


def keep_cpu_products_inside() -> None:
    """Forbid AMX products, before torch multiplies on a CPU, unless the user has set oneDNN's instruction set.

    In bfloat16 oneDNN's (PyTorch 2.11 to 2.13) read the left matrix's rows beyond their end where their length is no
    multiple of 32, and multiply what they find there by 0: NaN, where the memory has an infinity or a NaN."""
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def make_libraries_repeatable() -> None:
    """Let cuBLAS work, once torch is imported, in workspaces of its own for each stream, where several streams that
    multiply would else share them, and flash-attn, as transformers calls it, sum in a fixed order.

    Raises UserError where the user has set workspaces that PyTorch does not count as deterministic."""
    wanted = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", REPEATABLE_WORKSPACES[0])
    if wanted not in REPEATABLE_WORKSPACES:
        raise UserError(
            f"deterministic: true needs CUBLAS_WORKSPACE_CONFIG to be {' or '.join(REPEATABLE_WORKSPACES)}, and it is "
            f"{wanted!r}; unset it"
        )
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"


def cublas_workspace_bytes() -> int | None:
    """Return the bytes of the workspace that CUBLAS_WORKSPACE_CONFIG gives each stream; None where it is not set."""
    pieces = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    return sum(int(size) * int(count) for size, count in pieces) * 1024 if pieces else None


def _first_number(*names: str) -> int:
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), 0)


def _kernel() -> str:
    return platform.release().lower()


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name}={environ[name]!r} is not a number: start with torchrun, which sets it") from None
