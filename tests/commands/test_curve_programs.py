"""The programs that curve starts: signals reach them once, they do not outlive it, their lines can be typed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdp_qlora.commands.curve.programs import as_typed, flags, run_program, training
from fsdp_qlora.config.options import Config
from fsdp_qlora.config.parse import TRAIN, parse
from tests.support.torchrun import ROOT

# Tells its number, ends with 7 at the first signal after a while in which another one would come.
CHILD = """
import os, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
while not got:
    time.sleep(0.02)
time.sleep(0.5)
open(sys.argv[1] + ".got", "w").write(" ".join(str(int(number)) for number in got))
sys.exit(7)
"""
PARENT = """
import signal, sys
from fsdp_qlora.commands.curve.programs import run_program
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
try:
    print(run_program([sys.executable, "-c", sys.argv[1], sys.argv[2]]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def wait_for(path: Path) -> str:
    for _ in range(1500):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


def test_a_program_ends_with_its_code():
    before = signal.getsignal(signal.SIGINT)
    assert run_program([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_program_once_and_a_killed_curve_takes_it_along(number, tmp_path):
    place = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(place)], cwd=ROOT, start_new_session=True)
    child = int(wait_for(place))
    assert os.getpgid(child) != os.getpgid(parent.pid), "Ctrl-C of the terminal would reach it a second time"
    parent.send_signal(number)
    assert wait_for(Path(f"{place}.got")) == str(int(signal.SIGTERM if number == signal.SIGKILL else number))
    assert parent.wait(20) == (-9 if number == signal.SIGKILL else 130)


def test_flags_say_what_is_not_the_default_and_read_back():
    given = ["--model_name", "m x", "--lr", "3e-5", "--lora_target_modules", "q_proj,v_proj", "--base_cache", "null"]
    config = parse([*given, "--use_cpu_offload", "true", "--apply_gradient_clipping", "false", "--save_steps=4"])
    said = flags(config.to_flat(), TRAIN)
    assert parse(said) == config
    assert len(said) == 14


def test_a_command_line_reads_as_a_user_types_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = Config.from_flat({"model_name": "a model"})
    alone = as_typed(training(config, 200, Path("c/rows-200"), 1, {"resume": "auto"}))
    tail = "train.py --model_name 'a model' --dataset_samples 200 --output_dir c/rows-200 --resume auto"
    assert alone == f"python {tail}"
    two = as_typed(training(config, 200, Path("c/rows-200"), 2, {"resume": "auto"}))
    assert two == f"torchrun --standalone --nproc_per_node=2 {tail}"
    assert parse(shlex.split(alone)[2:]).data.dataset_samples == 200
