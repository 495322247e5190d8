"""The home rig on a large machine: 70B QLoRA through `train.py` on two GPUs capped at 24 GiB each, peer access off.

    python benchmarks/rig.py --out rig.json [--batch_size 2] [--context_length 512] [--steps 10] [-- train.py's options]

Gaming cards have no peer access, so every byte between them goes through host memory: NCCL_P2P_DISABLE=1 makes large
cards do the same. The model has Llama-2-70B's shape and random weights: speed and memory do not depend on the values.
A run counts only if it is right: every loss finite and near that of a model that knows nothing, ln(vocabulary).
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from fsdp_qlora.runtime.gpu_memory import used_by_card

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, dict[str, Any]] = {
    "llama2_70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                   "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama2_70b_10_layers": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 10,
                             "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
                             "max_position_embeddings": 4096},
    "llama3_8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
                  "rope_theta": 500000.0},
}  # fmt: skip
WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2_70b")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--cap_gib", type=float, default=24.0)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--first_gpu", type=int, default=0, help="of those that are taken, for several runs at once")
    parser.add_argument("--peer_access", action="store_true", help="leave NVLink or PCIe peer access on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file the row is appended to, one line each")
    parser.add_argument("train_options", nargs="*", help="after --: further options of train.py")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(asked, Path(scratch))
    with asked.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['tokens_per_second']:,.0f} tok/s, {row['seconds_per_step']:.3f} s/step, "
          f"GPU {row['gpu_allocated_gib']:.2f} / {row['gpu_reserved_gib']:.2f} GiB, host {row['host_gib']:.1f} GiB, "
          f"start to first step {row['start_seconds']:.0f} s")  # fmt: skip
    return 0


def measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run train.py once and read its metrics; raises where the run failed or its losses cannot be right."""
    shape = SHAPES[asked.shape]
    model = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, **shape}
    (scratch / "model").mkdir()
    (scratch / "model" / "config.json").write_text(json.dumps(model))
    given = dict(option.removeprefix("--").split("=", 1) for option in asked.train_options)
    rows = asked.steps * asked.gpus * asked.batch_size * int(given.get("gradient_accumulation_steps", 1))
    if given.get("packing") == "true":
        rows = math.ceil(rows * asked.context_length / int(given["dummy_row_tokens"]) * 1.1)
    options = {
        "model_name": scratch / "model", "dummy_weights": "true", "dataset": "dummy", "dataset_samples": rows,
        "batch_size": asked.batch_size, "context_length": asked.context_length, "max_steps": asked.steps,
        "gpu_memory_gib": asked.cap_gib, "output_dir": scratch / "out", "save_model": "false", "log_to": "stdout",
        "verbose": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(asked.gpus)]
    command += [str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in options.items()), *asked.train_options]
    environment = dict(os.environ) if asked.peer_access else os.environ | {"NCCL_P2P_DISABLE": "1"}
    cards = range(asked.first_gpu, asked.first_gpu + asked.gpus)
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, cards))
    with Watch(cards) as watch:
        code, seconds, stages = run(command, environment)
    if code:
        raise SystemExit(f"train.py ended with {code}")
    metrics = scratch / "out" / "metrics.jsonl"
    steps = [record for record in map(json.loads, metrics.read_text().splitlines()) if "loss" in record]
    unknowing = math.log(shape["vocab_size"])
    for step in steps:
        if not 0.8 * unknowing < step["loss"] < 1.6 * unknowing:
            loss = step["loss"]
            raise SystemExit(f"step {step['step']}: loss {loss} is not that of an untrained model ({unknowing:.2f})")
    typical = steps[WARM_UP:] or steps[-1:]  # of the longest contexts there are few
    return {
        "shape": asked.shape, "gpus": asked.gpus, "cap_gib": asked.cap_gib, "peer_access": asked.peer_access,
        "batch_size": asked.batch_size, "context_length": asked.context_length, "steps": asked.steps,
        "options": asked.train_options,
        "tokens_per_second": round(statistics.median(s["tokens_per_second"] for s in typical), 1),
        "seconds_per_step": round(statistics.median(s["seconds"] for s in typical), 4),
        "gpu_allocated_gib": max(steps[-1]["gpu_allocated_gib"]),
        "gpu_reserved_gib": max(steps[-1]["gpu_reserved_gib"]), "gpu_retries": max(steps[-1]["gpu_retries"]),
        "card_gib": round(watch.most / 2**30, 2), "retries_after_2": steps_retries(steps),
        "first_seconds": [round(s["seconds"], 3) for s in steps[:3]],
        "host_gib": round(max(sum(s["host_rss_gib"]) for s in steps), 2),
        "start_seconds": round(seconds, 1), "start_stages": stages,
        "losses": [s["loss"] for s in steps], "device": torch.cuda.get_device_name(0), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": sys.version.split()[0], "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def run(command: list[str], environment: dict[str, str]) -> tuple[int, float, dict[str, float]]:
    """Run it, showing what it prints. Return (exit code, seconds from here to the first step, those of each stage).

    The stages are those of rank 0, from the beginning of its process on: what is before them is torchrun's."""
    start, seconds, stages = time.perf_counter(), 0.0, {}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("started "):
                seconds = time.perf_counter() - start
                told = re.findall(r"([a-z ]+?) ([\d.]+) s(?:,|$)", line.partition(": ")[2])
                stages = {name.strip(): float(took) for name, took in told}
            print(line, end="", flush=True)
    return process.returncode, seconds, stages


def steps_retries(steps: list[dict]) -> int:
    """Retries of the allocator after the second step."""
    return max(steps[-1]["gpu_retries"]) - max(steps[min(1, len(steps) - 1)]["gpu_retries"])


class Watch:
    """The most memory that is in use on any of some cards, beyond what was before, as nvidia-smi counts it."""

    def __init__(self, cards: range) -> None:
        self.most = 0
        self._cards, self._over = cards, threading.Event()
        self._before = self._used()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.2):
            grown = [now - then for now, then in zip(self._used(), self._before, strict=True)]
            self.most = max([self.most, *grown])

    def _used(self) -> list[int]:
        used = list(used_by_card().values())
        return [used[card] for card in self._cards] if used else []


def _commit() -> str:
    told = os.environ.get("COMMIT")  # where the checkout travels without its history
    if told:
        return told
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
