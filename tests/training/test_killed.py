"""A run that is killed in the middle of anything it writes goes on to the adapter of the run that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.support import tiny
from tests.support.runs import Run, flags, run_alone
from tests.support.torchrun import ROOT

KILLS, STEPS = 4, 9
# Each attempt is a process of its own, made by fork, so that the imports are paid once. It kills itself with SIGKILL
# before one of the calls by which a run writes and moves files: which one is drawn, so no clock decides anything.
SCRIPT = """
import json, os, random, shutil, signal, sys
from pathlib import Path
import train
from fsdp_qlora import run
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.training import checkpoint, checkpoint_folder
from fsdp_qlora.training.tensor_file import TensorFile

arguments, kills = json.loads(sys.argv[1]), int(sys.argv[2])
left = [0]

def dies(place, name):
    do = getattr(place, name)
    def counted(*given, **more):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(*given, **more)
    setattr(place, name, counted)

for place, name in [(TensorFile, "_write"), (TensorFile, "close"), (checkpoint_folder, "sync_folder"),
                    (checkpoint, "write_synced"), (checkpoint_folder, "write_synced"), (shutil, "rmtree"),
                    (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Metrics, "_write")]:
    dies(place, name)

draw = random.Random(3)
for attempt in range(kills + 1):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        left[0] = draw.randint(1, 50) if attempt < kills else -1
        code = 1
        try:
            code = train.main(arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)
    draw.random()
    _, status = os.waitpid(child, 0)
    ended = "killed" if os.WIFSIGNALED(status) else f"ended with {os.waitstatus_to_exitcode(status)}"
    print(f"attempt {attempt} {ended}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a process made by fork can use no GPU")
def test_a_run_killed_again_and_again_ends_as_the_one_that_was_left_alone(tmp_path: Path) -> None:
    tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path / "model")
    tiny.save_rows(tmp_path / "rows.jsonl", 21)
    options = {
        "model_name": tmp_path / "model",
        "dataset": tmp_path / "rows.jsonl",
        "context_length": 56,
        "rows_cache": "null",
        "num_epochs": 2,
        "max_steps": STEPS,
        "batch_size": 4,
        "lora_dropout": 0.1,
        "precision": "bf16",
        "lr": 5e-3,
        "save_steps": 2,
        "save_total_limit": 2,
        "resume": "auto",
    }
    whole = run_alone(options, tmp_path / "whole")
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(flags(options | {"output_dir": folder})), str(KILLS)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.count(" killed\n") >= KILLS - 1, done.stdout + done.stderr
    assert f"attempt {KILLS} ended with 0" in done.stdout, done.stdout + done.stderr
    assert "steps are done" in done.stdout, "no attempt went on from a checkpoint"
    killed = Run(folder)
    assert killed.tensors.keys() == whole.tensors.keys()
    assert all((tensor == whole.tensors[name]).all() for name, tensor in killed.tensors.items())
    assert [(r["step"], r["loss"]) for r in killed.records] == [(r["step"], r["loss"]) for r in whole.records]
    assert len(list(folder.glob("checkpoint-*"))) == 2
    assert not list(folder.glob(".checkpoint-*"))
