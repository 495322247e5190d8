"""Ctrl-C and SIGTERM: all ranks stop after the same step, a second signal ends at once, nobody waits for the dead."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.torchrun import ROOT, finish, start_torchrun


@pytest.fixture(autouse=True)
def hangup_reaches_what_is_started() -> Iterator[None]:
    """Tests that are themselves run under nohup ignore it, and so would what they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


TRAINING = """
    import os, signal, sys, time, torch
    from fsdp_qlora.config.options import LaunchOptions
    from fsdp_qlora.distributed.interrupt import Interrupt
    from fsdp_qlora.distributed.world import open_world

    with open_world(LaunchOptions(), seed=1) as world, Interrupt(world) as interrupt:
        sys.stdout.write(f"rank {world.rank} trains\\n")
        for step in range(3000):
            if sys.argv[1] != "all" and world.rank == 1 and step == 7:
                os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(0.02)
            if interrupt.agreed():
                break
        time.sleep(1.5)  # saving takes its time, and is not hurried by the signal's echo
        sys.stdout.write(f"rank {world.rank} saved after step {step}, exit code {interrupt.exit_code}\\n")
    """


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(number):
    done = finish(start_torchrun(TRAINING, args=[str(int(number))]), timeout=60)
    assert done.returncode == 0, done.stderr
    saved = re.findall(r"rank (\d) saved after step (\d+), exit code (\d+)", done.stdout)
    assert sorted(saved) == [("0", "7", str(128 + number)), ("1", "7", str(128 + number))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_reach_the_ranks_through_torchrun_and_they_save(number):
    process = start_torchrun(TRAINING, args=["all"])
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"rank 0 trains\n", "rank 1 trains\n"}
    process.send_signal(number)
    done = finish(process, timeout=60)
    saved = re.findall(r"rank (\d) saved after step (\d+), exit code (\d+)", done.stdout)
    assert {rank for rank, _, _ in saved} == {"0", "1"}, done.stderr
    assert len({step for _, step, _ in saved}) == 1
    assert {code for _, _, code in saved} == {str(128 + number)}
    assert done.stderr.count(f"{number.name}: stopping after this step, then saving") == 1


ONE_PROCESS = """
import signal, sys, time, torch
from datetime import timedelta
from torch._C._distributed_c10d import HashStore
from fsdp_qlora.distributed import interrupt
from fsdp_qlora.distributed.world import World

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


def start_one(size: int, body: str, rescue: str = "None", nohup: bool = False) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*(["nohup"] if nohup else []), sys.executable, "-c", ONE_PROCESS.format(size=size, body=body, rescue=rescue)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x", "PATH": "/usr/bin:/bin"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "trains\n", process.communicate()
    return process


def until_heard(process: subprocess.Popen[str]) -> str:
    """Return what the process wrote until it said that it had heard of the signal: its clock runs from there."""
    assert process.stderr is not None
    said = ""
    while "stopping after this step" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


@pytest.mark.slow
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
    heard = until_heard(process)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (out, err)
    assert words in out + err
    assert (heard + err).count("stopping after this step") == 1


@pytest.mark.slow
def test_signals_that_come_together_do_not_break_into_the_unwinding():
    body = (
        "interrupt.UNWIND_SECONDS = 60\n"
        "        try: HashStore().wait(['never'], timedelta(seconds=4))\n"
        "        except RuntimeError: pass\n"
        "        while True: time.sleep(0.01)"
    )
    process = start_one(1, body)
    process.send_signal(signal.SIGINT)
    until_heard(process)
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)  # both handlers, this one's and the nudge's, run when C++ returns
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (7, "unwound\n"), err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rescue", "words"),
    [("lambda: '; the adapter is saved'", "left; the adapter is saved"), ("stuck", "left without saving")],
    ids=["can save alone", "cannot even save"],
)
def test_a_rank_stuck_on_a_dead_peer_says_so_before_torchrun_kills_it(rescue, words):
    process = start_one(2, "stuck()", rescue)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, (out, err)
    assert "rank 0: no step ended within" in err
    assert "another rank has probably ended" in err
    assert words in err


@pytest.mark.slow
def test_a_rank_that_has_begun_to_save_is_not_taken_for_stuck():
    process = start_one(
        2, "time.sleep(0.2)\n        while not stop.requested: time.sleep(0.01)\n        time.sleep(2.5)"
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)


@pytest.mark.slow
def test_a_rank_that_writes_a_checkpoint_is_not_taken_for_stuck():
    process = start_one(2, "with stop.busy(): time.sleep(2.5)")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)


WAITS = "for _ in range(400):\n            time.sleep(0.02)\n            if stop.requested: sys.exit(stop.exit_code)"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
def test_signals_that_would_kill_ask_for_an_orderly_end(number):
    process = start_one(1, WAITS)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, (out, err)
    assert f"{number.name}: stopping after this step, then saving" in err


@pytest.mark.slow
def test_a_hangup_that_comes_twice_is_no_hurry():
    """The shell sends one, the system another, torchrun a third."""
    process = start_one(1, "time.sleep(2)")
    for _ in range(3):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    assert err.count("the terminal or connection was closed") == 1


@pytest.mark.slow
def test_under_nohup_a_hangup_is_nothing():
    process = start_one(1, "time.sleep(1)\n        print(stop.requested)", nohup=True)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "False\n"), err


IN_TERMINAL = """
import sys, time
sys.path.insert(0, {root!r})
from fsdp_qlora.runtime.terminal import prepare_streams
prepare_streams()
sys.stdout.write("trains\\n"); sys.stdout.flush()
sys.stdin.read()
for _ in range(20):
    print("a step", flush=True)
    sys.stderr.write("a bar\\r"); sys.stderr.flush()
    time.sleep(0.02)
open({done!r}, "w").write("saved")
"""


def test_what_is_printed_to_a_terminal_that_is_gone_ends_nothing(tmp_path):
    ours, theirs = pty.openpty()
    program = IN_TERMINAL.format(root=str(ROOT), done=str(tmp_path / "done"))
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 20).startswith(b"trains")
    os.close(ours)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "done").read_text() == "saved"


def test_a_reader_that_leaves_and_letters_that_the_terminal_lacks_end_nothing():
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from fsdp_qlora.runtime.terminal import prepare_streams\nprepare_streams()\n"
        "print('käse «é»', flush=True)\nprint('käse', file=sys.stderr, flush=True)\nsys.stdin.read()\n"
        "for _ in range(99): print('x' * 999, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"k\\xe4se \\xab\\xe9\\xbb\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == b"k\\xe4se\n"
    process.stderr.close()
