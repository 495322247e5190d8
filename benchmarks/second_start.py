"""A first start, which quantizes and keeps its base, beside a second one, which reads it: seconds, rates, host memory.

    python -m benchmarks.second_start --folder FOLDER [--shape llama2_70b_10_layers] [--gpus 2] [-- train.py's options]

writes a random checkpoint of that shape into FOLDER (17 GB at 10 layers of 70B, 16 at 8B), which should be on the disk
that is to be measured, and starts train.py for two steps: without a cache, with an empty one, and twice with what that
left. Before each start the checkpoint and the cache are dropped from the system's memory, but before the last. Losses
must be the same to the last bit. `small` is for a machine without a GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.base_cache import forget
from benchmarks.rig import ROOT, SHAPES
from benchmarks.timing import environment

SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
         "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip
STARTS = (("no cache", "null", True), ("first", "kept", True), ("second", "kept", True), ("again", "kept", False))
SHOWN = ("loaded", "started", "host", "GPU", "base_cache")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=["small", *SHAPES], default="llama2_70b_10_layers")
    parser.add_argument("--gpus", type=int, default=2, help="ranks")
    parser.add_argument("--out", type=Path, help="JSON lines file that the rows are appended to")
    parser.add_argument("train_options", nargs="*", help="after --: further options of train.py")
    asked = parser.parse_args()
    model, cache = asked.folder / asked.shape, asked.folder / "cache"
    if not (model / "model.safetensors.index.json").exists():
        make_checkpoint(model, SMALL if asked.shape == "small" else SHAPES[asked.shape])
    rows = []
    for name, use, cold in STARTS:
        if cold:
            for file in [*model.glob("*.safetensors"), *cache.glob("*/*.safetensors")]:
                forget(file)
        row = {"benchmark": "second_start", "start": name, "shape": asked.shape, "ranks": asked.gpus}
        row |= start(model, asked.folder / "out", cache if use == "kept" else use, asked)
        rows.append(row)
        print(f"{name}: {row['seconds']:.1f} s in all", *row["said"], sep="\n    ", flush=True)
        if asked.out is not None:
            with asked.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if any(row["losses"] != rows[0]["losses"] for row in rows):
        raise SystemExit(f"the losses are not the same: {[row['losses'] for row in rows]}")
    size = sum(file.stat().st_size for file in cache.glob("*/*.safetensors"))
    print(f"{size / 1e9:.1f} GB are kept in {cache}; losses the same to the last bit: {rows[0]['losses']}")
    return 0


def start(model: Path, out: Path, cache: str | Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Run train.py for two steps; return what it said of its start."""
    options = {
        "model_name": model, "base_cache": cache, "dataset": "dummy", "dataset_samples": 4 * asked.gpus,
        "batch_size": 2, "context_length": 512, "max_steps": 2, "output_dir": out, "overwrite_output_dir": "true",
        "save_model": "false", "log_to": "stdout", "verbose": "true", "seed": 1,
    }  # fmt: skip
    options |= dict(option.removeprefix("--").split("=", 1) for option in asked.train_options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(asked.gpus)]
    command += [str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in options.items())]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NCCL_P2P_DISABLE": "1"})
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"train.py ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    said = [line for line in done.stdout.splitlines() if line.startswith(SHOWN)]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    loaded = next(re.search(r"in (\d+) s", line) for line in said if line.startswith("loaded"))
    return {
        "seconds": round(seconds, 1),
        "loaded_seconds": int(loaded[1]) if loaded else None,
        "said": said,
        "losses": [record["loss"] for record in records if "loss" in record],
        "options": asked.train_options,
        **environment(),
    }


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Write a Llama of random weights as Hugging Face does, a file for each layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head_dim = hidden // shape["num_attention_heads"]
    narrow = shape["num_key_value_heads"] * head_dim
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    vocabulary = (shape["vocab_size"], hidden)
    files: dict[str, dict[str, tuple[int, ...]]] = {
        "ends.safetensors": {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary,
                             "model.norm.weight": (hidden,)}
    }  # fmt: skip
    for i in range(shape["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {f"model.layers.{i}.{name}.weight": size for name, size in linears.items()}
        layer |= {
            f"model.layers.{i}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        files[f"layer-{i}.safetensors"] = layer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, sizes in files.items():
        made = {tensor: random_weight(size, device) for tensor, size in sizes.items()}
        save_file(made, folder / name, metadata={"format": "pt"})
    index = {tensor: name for name, sizes in files.items() for tensor in sizes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def random_weight(size: tuple[int, ...], device: str) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, dtype=torch.bfloat16, device=device) * size[1] ** -0.5).cpu()


if __name__ == "__main__":
    raise SystemExit(main())
