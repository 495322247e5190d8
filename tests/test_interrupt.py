"""Ctrl-C and SIGTERM: all ranks stop after the same step, a second signal ends at once, nobody waits for the dead."""

import re
import signal
import subprocess
import sys
import time

import pytest

from tests.torchrun import ROOT, finish, start_torchrun

TRAINING = """
    import os, signal, sys, time, torch
    from fsdp_qlora.config import LaunchOptions
    from fsdp_qlora.interrupt import Interrupt
    from fsdp_qlora.world import open_world

    with open_world(LaunchOptions(), seed=1) as world, Interrupt(world) as interrupt:
        sys.stdout.write(f"rank {world.rank} trains\\n")
        for step in range(3000):
            if sys.argv[1] == "one rank" and world.rank == 1 and step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
            if interrupt.agreed():
                break
        time.sleep(1.5)  # saving takes its time, and is not hurried by the signal's echo
        sys.stdout.write(f"rank {world.rank} saved after step {step}, exit code {interrupt.exit_code}\\n")
    """


def test_a_signal_to_one_rank_stops_all_at_the_same_step():
    done = finish(start_torchrun(TRAINING, args=["one rank"]), timeout=60)
    assert done.returncode == 0, done.stderr
    saved = re.findall(r"rank (\d) saved after step (\d+), exit code (\d+)", done.stdout)
    assert sorted(saved) == [("0", "7", "143"), ("1", "7", "143")]


def test_ctrl_c_reaches_the_ranks_through_torchrun_and_they_save():
    process = start_torchrun(TRAINING, args=["all"])
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"rank 0 trains\n", "rank 1 trains\n"}
    process.send_signal(signal.SIGINT)
    done = finish(process, timeout=60)
    saved = re.findall(r"rank (\d) saved after step (\d+), exit code (\d+)", done.stdout)
    assert {rank for rank, _, _ in saved} == {"0", "1"}, done.stderr
    assert len({step for _, step, _ in saved}) == 1
    assert {code for _, _, code in saved} == {"130"}
    assert done.stderr.count("SIGINT: stopping after this step, then saving") == 1


ONE_PROCESS = """
import signal, sys, time, torch
from datetime import timedelta
from torch._C._distributed_c10d import HashStore
from fsdp_qlora import interrupt
from fsdp_qlora.world import World

interrupt.SAME_REQUEST_SECONDS, interrupt.UNWIND_SECONDS = 0.3, 0.5
interrupt.STUCK_SECONDS, interrupt.RESCUE_SECONDS = 1.0, 0.5
before = signal.getsignal(signal.SIGINT)

def stuck():  # in C++, where no Python handler runs, as in a collective whose peer is gone
    HashStore().wait(["never"], timedelta(seconds=60))

try:
    with interrupt.Interrupt(World(0, {size}, 0, {size}, torch.device("cpu")), {rescue}) as stop:
        print("trains", flush=True)
        {body}
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is before
    print("unwound", flush=True)
    sys.exit(7)
"""


def start_one(size: int, body: str, rescue: str = "None") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_PROCESS.format(size=size, body=body, rescue=rescue)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x", "PATH": "/usr/bin:/bin"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "trains\n", process.communicate()
    return process


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("time.sleep(60)", 7, "unwound"),
        ("stuck()", 130, "left at once, without saving"),
    ],
    ids=["in Python", "in C++"],
)
def test_a_second_ctrl_c_ends_at_once_but_an_echo_does_not(body, code, words):
    process = start_one(1, body)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # torchrun and a batch system may both tell: one wish
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, (out, err)
    assert words in out + err
    assert err.count("stopping after this step") == 1


@pytest.mark.parametrize(
    ("rescue", "words"),
    [("lambda: '; the adapter is saved'", "left; the adapter is saved"), ("stuck", "left without saving")],
    ids=["can save alone", "cannot even save"],
)
def test_a_rank_stuck_on_a_dead_peer_says_so_before_torchrun_kills_it(rescue, words):
    process = start_one(2, "stuck()", rescue)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1, (out, err)
    assert "rank 0: no step ended within" in err
    assert "another rank has probably ended" in err
    assert words in err


def test_a_rank_that_has_begun_to_save_is_not_taken_for_stuck():
    process = start_one(
        2, "time.sleep(0.2)\n        while not stop.requested: time.sleep(0.01)\n        time.sleep(2.5)"
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, (out, err)
