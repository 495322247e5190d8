"""launch/slurm.sbatch, with SLURM and torchrun played: what starts on each node, and when the job goes on."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch/slurm.sbatch"
PLAYED = {
    "scontrol": 'if [ "$1" = show ]; then printf "$HOSTS"; else echo "$@" >>requeued; fi',
    # To the steps of the job and not to the script.
    "scancel": 'echo "$@" >>cancelled; kill -TERM $(cat rank0 rank1)',
    "srun": """
        while [ "${1#--}" != "$1" ]; do shift; done
        SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & wait -n; code=$?; wait; exit $code
        """,
    "sleep": "exit 0",
    "torchrun": """
        echo "$@" >started$SLURM_NODEID.new
        echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >patience
        trap 'exit 143' TERM
        echo $$ >rank$SLURM_NODEID
        mv started$SLURM_NODEID.new started$SLURM_NODEID
        for i in $(seq $ROUNDS); do read -t 0.05 <>pipe; done
        exit $CODE
        """,
}

Job = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Starts the script as SLURM does: options of train.py, and variables of the environment."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in PLAYED.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    os.mkfifo(tmp_path / "pipe")
    told = {
        "SLURM_JOB_ID": "61234", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4",
        "HOSTS": "n7\\nn8\\n", "ROUNDS": "200", "CODE": "0", "TORCHRUN": str(commands / "torchrun"),
    }  # fmt: skip

    def start(*options: str, **environ: str) -> subprocess.Popen[str]:
        env = os.environ | told | {"PATH": f"{commands}:{os.environ['PATH']}"} | environ
        return subprocess.Popen(
            ["bash", str(SCRIPT), *options], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def wait_for(*files: Path) -> None:
    late = time.monotonic() + 20
    while not all(file.exists() for file in files):
        assert time.monotonic() < late, f"{files} did not appear"
        time.sleep(0.01)


def test_every_node_starts_its_ranks_and_they_meet_on_the_first(job: Job, tmp_path: Path) -> None:
    out, _ = job("--config", "a run.yaml", "--lr", "1e-4", ROUNDS="0").communicate(timeout=30)
    assert "ended with 0" in out
    for node in range(2):
        assert (tmp_path / f"started{node}").read_text().strip() == (
            f"--node_rank {node} --nnodes 2 --nproc_per_node 4 --master_addr n7 --master_port 21234 train.py "
            "--config a run.yaml --lr 1e-4 --resume auto"
        )
    assert (tmp_path / "patience").read_text().strip() == "150"


@pytest.mark.parametrize("given", [["--resume", "out/checkpoint-3"], ["--resume=out/checkpoint-3"]])
def test_a_checkpoint_that_is_named_stays_the_one(given: list[str], job: Job, tmp_path: Path) -> None:
    job(*given, ROUNDS="0").communicate(timeout=30)
    assert (tmp_path / "started1").read_text().strip().endswith("train.py " + " ".join(given))


@pytest.mark.parametrize(("environ", "goes_on"), [({}, True), ({"SLURM_RESTART_COUNT": "20"}, False)])
def test_a_job_near_its_limit_saves_and_goes_back_into_the_queue(
    environ: Mapping[str, str], goes_on: bool, job: Job, tmp_path: Path
) -> None:
    running = job(**environ)
    wait_for(tmp_path / "started0", tmp_path / "started1")
    running.send_signal(signal.SIGUSR1)
    out, _ = running.communicate(timeout=30)
    assert running.returncode == 143, out
    assert (tmp_path / "cancelled").read_text().strip() == "--signal=TERM 61234"
    assert (tmp_path / "requeued").exists() == goes_on, out


def test_a_job_that_ends_by_itself_or_is_cancelled_does_not_go_on(job: Job, tmp_path: Path) -> None:
    failed = job(ROUNDS="0", CODE="1")
    failed.communicate(timeout=30)
    assert failed.returncode == 1
    (tmp_path / "started0").unlink()
    (tmp_path / "started1").unlink()
    cancelled = job()
    wait_for(tmp_path / "started0", tmp_path / "started1")
    for node in range(2):
        os.kill(int((tmp_path / f"rank{node}").read_text()), signal.SIGTERM)
    cancelled.communicate(timeout=30)
    assert cancelled.returncode == 143
    assert not (tmp_path / "requeued").exists()


def test_no_node_trains_alone_where_the_nodes_are_not_known(job: Job, tmp_path: Path) -> None:
    lost = job(HOSTS="")
    out, _ = lost.communicate(timeout=30)
    assert lost.returncode == 2
    assert "scontrol does not name the nodes of n[7-8]" in out
    assert not (tmp_path / "started0").exists()
