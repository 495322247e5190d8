"""What others make of the same step: transformers + PEFT + bitsandbytes, the same with Liger, and Unsloth, on one GPU.

    python -m benchmarks.peers --out peers.jsonl [--systems unsloth,peft] [--checkpoint FOLDER] [--steps 9]

A checkpoint of the shape with random weights, quantized to double NF4 as bitsandbytes does, is written block by block,
and every system loads it with its own `from_pretrained`. LoRA rank 16 on all seven linears, bfloat16, fused AdamW, full
rows, every position a label. Each system (and each way of Unsloth's to checkpoint) has a process to itself and is given
its best: PEFT's adapters in bfloat16 without autocast, which is its fastest; Unsloth under autocast, as its trainer.

A row counts only if its losses are those of a model that knows nothing, ln(vocabulary). The time is the median of the
steps after the third, and the memory the peak from the first step on, without loading. Where a system is not installed
or fails, its row says so. With `--shape tiny` PEFT runs on a CPU as well.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256}  # fmt: skip
LONG, SHORT = (4, 2048), (8, 512)  # batch x context
# name -> (the system, how it checkpoints, what is measured)
SYSTEMS: dict[str, tuple[str, object, list[tuple[int, int]]]] = {
    "unsloth": ("unsloth", True, [LONG, SHORT]),
    "unsloth-offloaded": ("unsloth", "unsloth", [LONG]),
    "unsloth-keeps-all": ("unsloth", False, [LONG]),
    "peft": ("peft", True, [LONG, SHORT]),
    "liger": ("liger", True, [LONG, SHORT]),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP, RANK, GIB = 3, 16, 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama3_8b", help="of benchmarks/rig.py, or tiny")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended to it, one a row")
    parser.add_argument("--checkpoint", type=Path, help="where the model is kept for another time, else nowhere")
    parser.add_argument("--alone", help="(how this starts itself) the system to measure in this process")
    asked = parser.parse_args()
    if asked.steps <= WARM_UP:
        parser.error(f"--steps {asked.steps}: the first {WARM_UP} are not measured")
    if asked.alone:
        measure(asked)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.checkpoint or Path(scratch)
        if not (folder / "config.json").exists():
            write_checkpoint(asked.shape, folder)
        for system in filter(None, asked.systems.split(",")):
            command = [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:], "--checkpoint", str(folder)]
            done = subprocess.run([*command, "--alone", system], cwd=ROOT, check=False)
            if done.returncode:
                append(asked.out, {"system": system, "failed": f"ended with {done.returncode}"} | facts(asked, system))
    return 0


def measure(asked: argparse.Namespace) -> None:
    """The rows of one system, in this process."""
    system, checkpointing, cases = SYSTEMS[asked.alone]
    load: Callable[[Path, object], Any] = {"peft": load_peft, "liger": load_liger, "unsloth": load_unsloth}[system]
    try:
        model = load(asked.checkpoint, checkpointing)
    except ImportError as error:
        append(asked.out, {"system": asked.alone, "failed": f"not installed: {error}"} | facts(asked, asked.alone))
        return
    import torch  # Unsloth is to be imported before it

    on_gpu = torch.cuda.is_available()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    cast = torch.autocast("cuda", torch.bfloat16) if system == "unsloth" else nullcontext()
    unknowing = math.log(model.config.vocab_size)
    for batch, context in cases if on_gpu else [(2, 64)]:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        seconds, losses = [], []
        for _ in range(asked.steps):
            ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
            start = time.perf_counter()
            with cast:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        typical = statistics.median(seconds[WARM_UP:])
        row = {
            "system": asked.alone, "checkpointing": checkpointing, "batch_size": batch, "context_length": context,
            "tokens_per_second": round(batch * context / typical, 1), "seconds_per_step": round(typical, 4),
            "gpu_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if on_gpu else None,
            "gpu_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if on_gpu else None,
            "trained_parameters": sum(p.numel() for p in trained), "losses": losses,
        }  # fmt: skip
        if not all(0.8 * unknowing < x < 1.6 * unknowing for x in losses):
            row["failed"] = f"losses are not those of an untrained model ({unknowing:.2f})"
        append(asked.out, row | facts(asked, asked.alone))
        print(f"{asked.alone} {batch} x {context}: {row['tokens_per_second']:,.0f} tok/s, "
              f"GPU {row['gpu_allocated_gib']} / {row['gpu_reserved_gib']} GiB", flush=True)  # fmt: skip


# ---- the systems, each from the folder of a quantized checkpoint


def load_peft(folder: Path, checkpointing: object) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa",
        device_map="cuda:0" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_liger(folder: Path, checkpointing: object) -> Any:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return load_peft(folder, checkpointing)


def load_unsloth(folder: Path, checkpointing: object) -> Any:
    from unsloth import FastLanguageModel  # isort: skip
    import torch

    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=2048, dtype=torch.bfloat16)
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=16, target_modules=LINEARS, use_gradient_checkpointing=checkpointing
    )


# ---- the model


def write_checkpoint(shape: str, folder: Path) -> None:
    """A *-bnb-4bit checkpoint of random weights, a file a block, with a byte tokenizer (which Unsloth wants)."""
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    from benchmarks.rig import SHAPES
    from tests.support.tiny import save_tokenizer

    method = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    config = LlamaConfig(**(SHAPES | {"tiny": TINY})[shape], rms_norm_eps=1e-5, pad_token_id=0, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    config.quantization_config = method.to_dict() | {"quant_method": "bitsandbytes"}
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files: dict[str, dict[str, torch.Tensor]] = {}
    where: dict[str, str] = {}
    for name, meta in shapes.items():
        place = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        file = f"model-{place}.safetensors"
        ones = meta.ndim == 1
        value = torch.ones(meta.shape) if ones else torch.randn(meta.shape, device=device) * config.initializer_range
        value = value.to(torch.bfloat16)
        parts = {name: value}
        if any(f"{linear}.weight" in name for linear in LINEARS):
            codes, state = bnb.quantize_4bit(value, compress_statistics=True, quant_type="nf4")
            parts = {name: codes} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        files.setdefault(file, {}).update({key: part.cpu() for key, part in parts.items()})
        where |= dict.fromkeys(parts, file)
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)  # last: whoever finds it finds all


# ---- rows


def facts(asked: argparse.Namespace, system: str) -> dict[str, object]:
    """What ran where."""
    import torch

    found: dict[str, object] = {"shape": asked.shape, "lora_rank": RANK, "steps": asked.steps}
    found["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    for package in ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger_kernel", "unsloth", "xformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "rev-parse", "--short", "HEAD"]
    here = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    found |= {"python": sys.version.split()[0], "commit": os.environ.get("COMMIT") or here}
    command = f"python -m benchmarks.peers --systems {system} --shape {asked.shape} --steps {asked.steps}"
    return found | {"command": command, "date": time.strftime("%Y-%m-%d")}


def append(out: Path, row: dict[str, object]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
