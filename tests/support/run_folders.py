"""Folders as runs leave them, made without a run: many steps, GPUs that are not here, what an earlier version wrote."""

import json
import math
from pathlib import Path
from typing import Any

GIB = 2**30
PARTS = {
    "frozen base": 9.6, "frozen base on its way": 1.3, "adapters": 1.6, "gradients, masters, optimizer": 4.9,
    "decoded weights, cuBLAS": 0.6, "kept for backward": 3.1, "working": 1.5,
}  # fmt: skip
HOST = {"system": "Linux 6.8.0", "cores": 32, "memory_bytes": 128 * GIB, "driver": "570.86.15"}
CARD = {"name": "NVIDIA GeForce RTX 4090", "memory_bytes": int(23.6 * GIB)}
KEEPS = ("input", "halves", "attention", "qkv", "all")


def step(number: int, **more: Any) -> dict[str, Any]:
    """Return the line of a step on two GPUs."""
    loss = 1.2 + 2 * math.exp(-number / 300) + 0.1 * math.sin(number * 12.9898)
    return {
        "step": number, "epoch": number / 1000, "loss": loss, "lr": 2e-4, "grad_norm": 0.5, "rows": 4, "tokens": 8000,
        "label_tokens": 3000, "seconds": 20.0 if number == 1 else 2.5 + 0.05 * math.cos(number),
        "gpu_allocated_gib": [22.4, 22.1], "gpu_reserved_gib": [22.8, 22.5], "gpu_retries": [0, 0],
        "host_rss_gib": [21.0, 20.5], "step_retries": 0, "tokens_per_second": 3200.0,
    } | more  # fmt: skip


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {
        "step": number, "epoch": number / 1000, "eval_loss": loss, "eval_label_tokens": 900, "eval_tokens": 2000,
        "eval_rows": 20, "eval_seconds": 4.5, "eval_is_best": True, "eval_perplexity": math.exp(loss),
    }  # fmt: skip


def plan(layers: int = 80) -> dict[str, Any]:
    """Return the plan.json of a base that is streamed to two GPUs."""
    blocks = [
        {"resident": i % 4 == 0, "keep": KEEPS[i * len(KEEPS) // layers], "offloaded": i < layers // 8}
        for i in range(layers)
    ]
    parts = {name: int(gib * GIB) for name, gib in PARTS.items()}
    return {
        "plan": {
            "placement": "stream", "blocks": blocks, "head_resident": False, "staging": 3, "micro_batch": 2,
            "accumulation": 1, "device_bytes": sum(parts.values()), "host_bytes": 34 * GIB, "seconds": 2.4,
            "parts": parts, "arena_bytes": 4 * GIB, "loading_bytes": 12 * GIB,
        },
        "facts": {
            "ranks": 2, "fused": True, "remat": True, "head_bytes": 10**8, "layers": layers, "batch": 2,
            "accumulation": 1,
        },
        "rates": {"h2d": 2.5e10},
    }  # fmt: skip


def part(from_step: int, **more: Any) -> dict[str, Any]:
    """Return a part of an environment.json."""
    return {
        "from_step": from_step, "steps": 1000, "started": "2026-11-01T10:00:00+00:00", "program": "0.1.0",
        "commit": "0123456789ab", "versions": {"python": "3.12.3", "torch": "2.13.0", "cuda": "13.0"}, "ranks": 2,
        "gpus": [CARD, CARD], "hosts": [HOST],
    } | more  # fmt: skip


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, steps: int = 1000, **files: Any) -> Path:
    """Write the files of a finished run of so many steps on two GPUs; return the folder. files: others, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [step(number) for number in range(1, steps + 1)]
    for at in range(0, steps + 1, max(1, steps // 10)):
        lines.append(evaluation(at, 1.5 + math.exp(-at / 300)))
    write_lines(folder / "metrics.jsonl", lines)
    ended = {"ended": {"time": "2026-11-01T11:00:00+00:00", "step": steps, "how": "finished"}}
    (folder / "plan.json").write_text(json.dumps(plan()))
    (folder / "environment.json").write_text(json.dumps({"parts": [part(0, steps=steps, **ended)]}))
    (folder / "config.yaml").write_text("model_name: meta-llama/Llama-2-70b-hf\nbatch_size: 2\nlora_rank: 64\n")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
