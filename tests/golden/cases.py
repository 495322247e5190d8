"""Define the short runs, train them through train.py and keep what they trained, to the last bit."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from tests.golden.environment import environment
from tests.support import tiny
from tests.support.torchrun import run_torchrun

Record = dict[str, Any]  # {"environment": {...}, "inputs": {name: checksum}, "cases": {name: {...}}}, as in runs.json

ROWS = 21  # by fours: the sixth step has one row, so that one of two ranks has nothing to do
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# family -> what its config says beyond tiny.SHAPE
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rope_parameters": ROPE},
    "Gemma3Text": {
        "head_dim": 24,
        "layer_types": KINDS,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
    "Phi3": {"sliding_window": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
}

# No option is left to the plan, which looks at the machine's memory; no row comes from an earlier run's cache.
COMMON = {"lora_rank": 8, "lr": 5e-3, "context_length": 56, "rows_cache": "null"}
REPLICATED = {"sharding_strategy": "ddp", "use_cpu_offload": False}
SHARDED = {"sharding_strategy": "full_shard", "use_cpu_offload": False}
HYBRID = {"sharding_strategy": "hybrid_full_shard", "use_cpu_offload": False}
STREAMED = {"use_cpu_offload": True, "resident_blocks": 0}
OFFLOADED = {"sharding_strategy": "shard_grad_op", "use_cpu_offload": True, "cpu_offload_by": "fsdp2"}
GENERIC = {"fused": "false"}
FOUR_AT_ONCE = {"batch_size": 4}  # rows
TWO_AND_TWO = {"batch_size": 2, "gradient_accumulation_steps": 2}
ONE_AND_ONE = {"batch_size": 1, "gradient_accumulation_steps": 2}
TWO_EACH = {"batch_size": 2}


def fused(keep: str, on_host: bool = False) -> dict[str, object]:
    """Return the options of fused blocks that keep `keep` for backward, on the host if asked."""
    return {"fused": "true", "keep_activations": keep, "use_activation_cpu_offload": on_host}


@dataclass(frozen=True)
class Case:
    """One run: a family's tiny model, a number of ranks and the options that make it what it is."""

    family: str
    ranks: int
    train_type: str
    precision: str
    options: dict[str, object]

    def as_recorded(self) -> dict[str, Any]:
        """Return what the case is, for the record: whoever changes it sees a difference that says so."""
        kind = {"train_type": self.train_type, "precision": self.precision}
        return {"family": self.family, "ranks": self.ranks, "options": COMMON | kind | self.options}

    def flags(self, folder: Path, name: str) -> list[str]:
        """Return train.py's arguments for this case, whose model and rows lie in `folder`."""
        places = {"model_name": folder / self.family, "dataset": folder / "rows.jsonl", "output_dir": folder / name}
        options = self.as_recorded()["options"] | places
        return [word for option, value in options.items() for word in (f"--{option}", str(value))]


CASES = {
    "llama-accumulates": Case("Llama", 1, "qlora", "fp32", REPLICATED | fused("input") | TWO_AND_TWO),
    "llama-lora-sgd": Case(
        "Llama",
        1,
        "lora",
        "bf16",
        REPLICATED | fused("qkv") | FOUR_AT_ONCE | {"optimizer": "sgd", "wd": 0.1, "lr": 0.5},
    ),
    "gemma3-streamed": Case("Gemma3Text", 1, "qlora", "bf16", STREAMED | fused("attention") | FOUR_AT_ONCE),
    "phi3-kept-on-host": Case("Phi3", 1, "qlora", "fp32", STREAMED | fused("halves", on_host=True) | TWO_AND_TWO),
    "qwen2-generic-dropout": Case(
        "Qwen2",
        1,
        "qlora",
        "fp32",
        REPLICATED | GENERIC | FOUR_AT_ONCE | {"lora_dropout": 0.3, "reentrant_checkpointing": True},
    ),
    "qwen3-keeps-all": Case("Qwen3", 1, "qlora", "bf16", REPLICATED | fused("all") | FOUR_AT_ONCE),
    "llama-generic-fp16-autocast": Case("Llama", 1, "qlora", "fp16_autocast", REPLICATED | GENERIC | FOUR_AT_ONCE),
    "granite-single-quantized": Case(
        "Granite",
        1,
        "qlora",
        "bf16_buffers_autocast",
        REPLICATED | GENERIC | FOUR_AT_ONCE | {"double_quant": False, "use_gradient_checkpointing": False},
    ),
    "two-llama-sharded": Case("Llama", 2, "qlora", "fp32", SHARDED | fused("all") | TWO_EACH),
    "two-llama-streamed-on-host": Case(
        "Llama", 2, "lora", "fp32", STREAMED | {"resident_blocks": 1} | fused("attention", on_host=True) | TWO_EACH
    ),
    "two-gemma3-hybrid": Case(
        "Gemma3Text", 2, "qlora", "bf16", HYBRID | {"hybrid_shard_size": 1} | fused("halves") | TWO_EACH
    ),
    "two-qwen2-dropout": Case(
        "Qwen2", 2, "qlora", "fp32", REPLICATED | fused("qkv") | TWO_EACH | {"lora_dropout": 0.3}
    ),
    "two-phi3-generic-no-sync": Case(
        "Phi3", 2, "lora", "bf16_autocast", SHARDED | GENERIC | ONE_AND_ONE | {"no_sync": True}
    ),
    "two-qwen2-offloaded": Case(
        "Qwen2",
        2,
        "qlora",
        "bf16",
        OFFLOADED | fused("input") | ONE_AND_ONE | {"use_rslora": True, "lora_target_modules": "q_proj,mlp.down_proj"},
    ),
    "two-gemma3-packed": Case(
        "Gemma3Text", 2, "qlora", "fp32", STREAMED | fused("qkv") | {"batch_size": 1, "packing": True, "num_epochs": 2}
    ),
    "four-llama-hybrid": Case(
        "Llama", 4, "qlora", "fp32", HYBRID | {"hybrid_shard_size": 2} | fused("all") | {"batch_size": 1}
    ),
}

# Each rank's memory that nobody has written is NaN, so that a run that reads it is seen.
WORKER = """
    import json, sys
    import torch
    from tests.golden.origin import strangers
    from tests.support.meeting import RANK, meet_at
    from tests.support.pictures import without_pictures
    from train import main

    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, arguments in json.load(open(sys.argv[1])).items():
        meet_at(name)
        with without_pictures():
            code = main(arguments)
        sys.stdout.write(f"rank {RANK}: {name} ended with {code}\\n")
    sys.stdout.write(f"rank {RANK}: modules of another checkout: {strangers()[:5]}\\n")
    """
# Always on the CPU, with its own kernels.
VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": None}


def run_all(folder: Path, timeout: float = 300) -> Record:
    """Train every case in `folder`, which is empty, one launch for each number of ranks; return their record."""
    inputs = _save_inputs(folder)
    for ranks in sorted({case.ranks for case in CASES.values()}):
        _launch({name: case for name, case in CASES.items() if case.ranks == ranks}, ranks, folder, timeout)
    cases = {name: case.as_recorded() | _read(folder / name) for name, case in CASES.items()}
    return {"environment": environment(), "inputs": inputs, "cases": cases}


def _save_inputs(folder: Path) -> dict[str, str]:
    """Save the models and rows that the cases read; return their checksums."""
    checksums = {}
    for family, more in FAMILIES.items():
        config = getattr(transformers, f"{family}Config")(**tiny.SHAPE | more)
        tiny.save_model(config, folder / family)
        checksums[family] = checksum(folder / family / "model.safetensors")
    rows = tiny.save_rows(folder / "rows.jsonl", ROWS)
    return checksums | {"rows": hashlib.sha256(rows.read_bytes()).hexdigest()}


def _launch(cases: dict[str, Case], ranks: int, folder: Path, timeout: float) -> None:
    """Train `cases` in one launch of `ranks` ranks. Raises RuntimeError unless all end well and with this code."""
    listing = folder / f"{ranks}-ranks.json"
    listing.write_text(json.dumps({name: case.flags(folder, name) for name, case in cases.items()}))
    done = run_torchrun(WORKER, ranks, [str(listing)], env=VARIABLES, timeout=timeout)
    lines = done.stdout.splitlines()
    wanted = [f"{name} ended with 0" for name in cases] + ["modules of another checkout: []"]
    missing = [f"rank {rank}: {end}" for end in wanted for rank in range(ranks) if f"rank {rank}: {end}" not in lines]
    if missing:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}\nnot seen: {'; '.join(missing)}")


def _read(folder: Path) -> dict[str, Any]:
    """Read what a finished run left: metrics.jsonl, whose numbers have all their digits, and the adapter."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [float(step["loss"]).hex() for step in steps],
        "norms": [float(step["grad_norm"]).hex() for step in steps],
        "adapter": checksum(folder / "adapter_model.safetensors"),
    }


def checksum(file: Path) -> str:
    """Return the SHA-256 over a safetensors file's tensors by name: dtype, shape and bytes."""
    digest = hashlib.sha256()
    with safe_open(file, "pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor: Tensor = tensors.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
