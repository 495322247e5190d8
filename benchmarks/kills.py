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


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, after: int) -> None:
    """Return when the run has done a step more than `after`, or has ended."""
    while process.poll() is None and not any(record["step"] > after for record in records(folder)[-1:]):
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tiny.save_model(LlamaConfig(**tiny.SHAPE), place / "model")
        tiny.save_rows(place / "rows.jsonl", 40)
        began = time.monotonic()
        whole = start(command(place, place / "whole", args.ranks, args.steps))
        wait_for_step(whole, place / "whole", 0)
        first = time.monotonic() - began
        out, _ = whole.communicate()
        if whole.returncode:
            print(out.decode())
            return 1
        training = time.monotonic() - began - first
        print(f"left alone: {args.steps} steps in {training:.1f} s, {first:.1f} s to the first", flush=True)
        killed = place / "killed"
        for number in range(args.kills):
            before = max((record["step"] for record in records(killed)), default=0)
            process = start(command(place, killed, args.ranks, args.steps))
            time.sleep(draw.uniform(0.5 * first, first + 1.5 * training / args.kills))
            kill(process)
            steps = [record["step"] for record in records(killed)]
            saved = sorted(path.name for path in killed.glob("checkpoint-*"))
            part = " and one half written" * bool(list(killed.glob(".checkpoint-*")))
            print(f"kill {number + 1}: before it {before}, now {steps[-1:] or 'no'} steps; {saved}{part}", flush=True)
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
