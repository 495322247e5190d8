"""`merge` and `gguf` at 70B's width on this machine's CPU: their rate, and the host memory that they hold.

    python -m benchmarks.export --folder FOLDER [--layers 8] [--only gguf] [--train_types lora,qlora] [--out rows.jsonl]

writes a Llama of random weights (1.7 GB a layer) and random adapters into FOLDER and runs the commands on them, each in
a process of its own. What they write is removed. A row tells millions of the model's numbers per second, from the start
of the process to its end. Of `gguf` it also tells the share of what its quantizer alone could do: libggml-python's
`ggml_quantize_chunk`, timed on one thread before and after on rows of each type in the file, times the threads.

A block is its linears and norms in 16 bits. `anonymous_gib` is memory that is no file's, `resident_gib` all that was
resident: the libraries, and pages of files that are mapped, too.
"""

import argparse
import json
import shutil
import time
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from benchmarks.rig import SHAPES
from benchmarks.second_start import SMALL, make_checkpoint, random_weight
from benchmarks.timing import environment
from fsdp_qlora.export.gguf.encode import ggml_quantizer
from fsdp_qlora.export.gguf.quantize import nbytes_of
from fsdp_qlora.runtime.launcher import usable_cores
from fsdp_qlora.units import GIB
from fsdp_qlora.weights.checkpoint_files import files_of, open_file
from tests.support.measured import Measured, run_measured
from tests.support.saved_adapters import save_random_adapter
from tests.support.small_tokenizers import gpt2_tokenizer

COMMANDS = {
    "merge": ["merge", "--check_rows", "0"],
    "merge and compare": ["merge"],
    "gguf": ["gguf", "--quantization", "q4_k_m"],
}
WHEEL_NUMBERS, WHEEL_WIDTH = 1 << 23, 8192  # of each type
WHEEL_TYPES = (Type.Q4_K, Type.Q6_K)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=["small", *SHAPES], default="llama2_70b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", choices=COMMANDS)
    parser.add_argument("--train_types", default="lora,qlora")
    parser.add_argument("--out", type=Path, help="JSON lines file that the rows are appended to")
    asked = parser.parse_args()
    model = asked.folder / f"{asked.shape}-{asked.layers}"
    if not (model / "model.safetensors.index.json").exists():
        shape = SMALL if asked.shape == "small" else SHAPES[asked.shape]
        make_checkpoint(model, shape | {"num_hidden_layers": asked.layers})
        gpt2_tokenizer().save_pretrained(model)
    for train_type in asked.train_types.split(","):
        adapter = asked.folder / f"adapter-{train_type}"
        save_random_adapter(adapter, {"model_name": model, "train_type": train_type, "lora_rank": 64}, size=1e-5)
        for name in [asked.only] if asked.only else COMMANDS:
            row = {"benchmark": "export", "what": name, "train_type": train_type, "shape": asked.shape}
            row |= {"layers": asked.layers, **measure(name, adapter, model, asked.folder / "out"), **environment()}
            print(json.dumps(row, indent=1), flush=True)
            if asked.out is not None:
                with asked.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


def measure(name: str, adapter: Path, model: Path, out: Path) -> dict[str, object]:
    """Run one command; return its figures."""
    tensors = {name: tensor for file in files_of(model) for name, tensor in open_file(file).tensors().items()}
    numbers = {name: torch.Size(tensor.shape).numel() for name, tensor in tensors.items()}
    block = 2 * sum(count for tensor, count in numbers.items() if ".layers.0." in tensor)
    before = wheel_rates() if name == "gguf" else {}
    took = run_measured(["-m", "fsdp_qlora", *COMMANDS[name], "--adapter", adapter, "--output_dir", out])
    if took.code:
        raise SystemExit(took.said)
    figures = {
        "said": [line for line in took.said.splitlines() if line.startswith(("errors", "rounding", "compared"))],
        "cpu": cpu_name(),
        "cores": usable_cores(None),
        "seconds": round(took.seconds, 1),
        "cpu_seconds": round(took.cpu_seconds, 1),
        "millions_per_second": round(sum(numbers.values()) / took.seconds / 1e6, 2),
        "block_gib": round(block / GIB, 2),
        "anonymous_gib": round(took.anonymous_bytes / GIB, 2),
        "resident_gib": round(took.resident_bytes / GIB, 2),
    }
    if name == "gguf":
        rates = {kind: (rate + before[kind]) / 2 for kind, rate in wheel_rates().items()}
        figures |= beside_wheel(next(out.glob("*.gguf")), took, rates)
    shutil.rmtree(out)
    return figures


def wheel_rates() -> dict[Type, float]:
    """Return by type the numbers per second that the wheel encodes on one thread."""
    encode, rates = ggml_quantizer(), {}
    rows = random_weight((WHEEL_NUMBERS // WHEEL_WIDTH, WHEEL_WIDTH), "cpu").float().numpy()
    for kind in WHEEL_TYPES:
        out = np.empty(nbytes_of(kind, rows.shape), dtype=np.uint8)
        start = time.thread_time()
        encode(int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
        rates[kind] = rows.size / (time.thread_time() - start)
    return rates


def beside_wheel(file: Path, took: Measured, rates: dict[Type, float]) -> dict[str, object]:
    """Return what the wheel alone would take for a file's tensors on all cores, and the share of the rate that came."""
    counts: Counter[Type] = Counter()
    for tensor in gguf.GGUFReader(file).tensors:
        counts[tensor.tensor_type] += int(tensor.n_elements)
    wheel_seconds = sum(count / rates[kind] for kind, count in counts.items() if kind in rates) / usable_cores(None)
    return {
        "wheel_millions_per_second_one_thread": {kind.name: round(rate / 1e6, 2) for kind, rate in rates.items()},
        "wheel_seconds_all_cores": round(wheel_seconds, 1),
        "share_of_wheel": round(wheel_seconds / took.seconds, 3),
        "share_of_wheel_by_cpu_seconds": round(wheel_seconds * usable_cores(None) / took.cpu_seconds, 3),
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    raise SystemExit(main())
