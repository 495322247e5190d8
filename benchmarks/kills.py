"""A run that is killed again and again, against the same run left alone: the adapters must be equal to the last bit.

    python -m benchmarks.kills --kills 20 --ranks 2

trains a small random model on the CPU by torchrun with a checkpoint after every 2 steps, kills torchrun and all ranks
with SIGKILL at a random moment, starts the same command line again (`--resume auto`), and so on; the last start is left
alone. Prints a line for each kill, and at the end whether adapter, losses, rates and norms are equal. Exit code 1 where
they are not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers import LlamaConfig

from tests.support import tiny

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = "adapter_model.safetensors"


def command(place: Path, folder: Path, ranks: int, steps: int) -> list[str]:
    options = {
        "model_name": place / "model",
        "dataset": place / "rows.jsonl",
        "output_dir": folder,
        "context_length": 56,
        "batch_size": 2,
        "num_epochs": 1000,
        "max_steps": steps,
        "lora_dropout": 0.1,
        "lr": 5e-3,
        "precision": "bf16",
        "save_steps": 2,
        "save_total_limit": 3,
        "resume": "auto",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(ROOT / "train.py")]
    return [sys.executable, *launch, *words]


def start(line: list[str]) -> subprocess.Popen[bytes]:
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environ["TOKENIZERS_PARALLELISM"] = "false"
    return subprocess.Popen(line, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End torchrun and its ranks at once, torchrun first, so that it tells no rank to stop."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for one in family:
        one.kill()
    process.communicate()


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the kill's
            break
    return found


def inode(folder: Path) -> int:
    """Return what tells the record of one process from that of the next, which begins it anew; 0: there is none."""
    file = folder / "metrics.jsonl"
    return file.stat().st_ino if file.exists() else 0


def wait_for_training(process: subprocess.Popen[bytes], folder: Path, before: int) -> None:
    """Return when the process has done a step, or has ended. before: `inode` when it was started."""
    while process.poll() is None and inode(folder) in (0, before):
        time.sleep(0.02)
    begun = len(records(folder))
    while process.poll() is None and len(records(folder)) <= begun:
        time.sleep(0.02)


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tiny.save_model(LlamaConfig(**tiny.SHAPE), place / "model")
        tiny.save_rows(place / "rows.jsonl", 40)
        began = time.monotonic()
        whole = start(command(place, place / "whole", args.ranks, args.steps))
        wait_for_training(whole, place / "whole", 0)
        first = time.monotonic() - began
        out, _ = whole.communicate()
        if whole.returncode:
            print(out.decode())
            return 1
        training = time.monotonic() - began - first
        print(f"left alone: {args.steps} steps in {training:.1f} s, {first:.1f} s to the first", flush=True)
        killed = place / "killed"
        for number in range(args.kills):
            before = inode(killed)
            process = start(command(place, killed, args.ranks, args.steps))
            if number % 5 == 4:  # one in five while it starts; the others among its steps and checkpoints
                time.sleep(draw.uniform(0.3 * first, first))
            else:
                wait_for_training(process, killed, before)
                time.sleep(draw.uniform(0, 6 * training / args.steps))
            if process.poll() is not None:
                print(process.communicate()[0].decode())
                return 1
            kill(process)
            step = max((record["step"] for record in records(killed)), default=0)
            saved = ", ".join(path.name for path in sorted(killed.glob("checkpoint-*"), key=step_of)) or "no checkpoint"
            part = " and one half written" * bool(list(killed.glob(".checkpoint-*")))
            print(f"kill {number + 1}: after step {step}; {saved}{part}", flush=True)
        last = start(command(place, killed, args.ranks, args.steps))
        out, _ = last.communicate()
        print(next((line for line in out.decode().splitlines() if line.startswith("resume")), "from the beginning"))
        same = (killed / ADAPTER).read_bytes() == (place / "whole" / ADAPTER).read_bytes()
        numbers = [
            [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in records(f)] for f in (killed, place / "whole")
        ]
        print(f"adapter {'equal' if same else 'DIFFERENT'} to the last bit; ", end="")
        print(f"{len(numbers[0])} losses, rates and norms {'equal' if numbers[0] == numbers[1] else 'DIFFERENT'}")
        return 0 if same and numbers[0] == numbers[1] and last.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
