"""Answers: our tokens per second beside transformers + PEFT + bitsandbytes and Unsloth, and a 70B that is streamed.

    python -m benchmarks.generate --out answers.jsonl [--systems ours,peft,unsloth] [--checkpoint FOLDER]
    torchrun --nproc_per_node 2 -m benchmarks.generate --out answers.jsonl --systems streamed --shape llama2_70b \\
        --gpu_memory_gib 24

The first: a checkpoint of the shape with random weights in double NF4 (`benchmarks/peers.py` writes it) and a random
adapter of rank 16 on all linears; prompts of 512 random tokens, 64 new ones, batch 1, 8 and 32, greedy, bfloat16. Each
system has a process to itself. Tokens per second are those of all rows over the whole call, the prompts' pass included;
of three calls the best, after one that warms up. Ours is `generation/` as the command runs it.

Before PEFT is timed its logits are compared with ours, of the first row and the last: behind the prompt, and behind
seven of our steps (PEFT is given prompt and tokens whole). The truth is PEFT with everything in float32; ours may be
twice as far from it as PEFT's bfloat16 is, else the row is marked as failed and the exit code is 1.

The second: 200 prompts of 256 tokens, 5 new ones each, random weights that are never read from a disk, after a row on
each rank that warms up, whose seconds are `first_seconds`. The link's floor is what is streamed of the base in all
passes over the link's measured rate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import peers

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW, BATCHES = 512, 64, (1, 8, 32)
TINY_PROMPT, TINY_NEW, TINY_BATCHES = 24, 12, (1, 3)
FORCED = 7  # steps before the logits that are compared
STREAMED_ROWS, STREAMED_PROMPT, STREAMED_NEW = 200, 256, 5
ALPHA = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama3_8b", help="of benchmarks/rig.py, or tiny")
    parser.add_argument("--systems", default="ours,peft")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended to it, one a row")
    parser.add_argument("--checkpoint", type=Path, help="where the model is kept for another time, else nowhere")
    parser.add_argument("--gpu_memory_gib", type=float, help="of ours and streamed: what a card has")
    parser.add_argument("--alone", help="(how this starts itself) the system to measure in this process")
    asked = parser.parse_args()
    asked.steps = NEW
    if asked.systems == "streamed":
        streamed(asked)
        return 0
    if asked.alone:
        return {"ours": ours, "peft": by_peft, "unsloth": by_unsloth}[asked.alone](asked)
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.checkpoint or Path(scratch)
        if not (folder / "config.json").exists():
            peers.write_checkpoint(asked.shape, folder)
        if not (folder / "adapter").exists():
            write_adapter(folder)
        failed = 0
        for system in filter(None, asked.systems.split(",")):
            command = [sys.executable, "-m", "benchmarks.generate", *sys.argv[1:], "--checkpoint", str(folder)]
            done = subprocess.run([*command, "--alone", system], cwd=ROOT, check=False)
            if done.returncode:
                failed = 1
                row = {"system": system, "failed": f"ended with {done.returncode}"}
                peers.append(asked.out, row | facts(asked, system))
    return failed


def sizes(asked: argparse.Namespace) -> tuple[int, int, tuple[int, ...]]:
    """Return (prompt tokens, new tokens, batches)."""
    return (TINY_PROMPT, TINY_NEW, TINY_BATCHES) if asked.shape == "tiny" else (PROMPT, NEW, BATCHES)


def prompts_of(vocabulary: int, batch: int, length: int) -> Any:
    """Return random ids [B, S], the same for every system."""
    import torch

    make = torch.Generator().manual_seed(batch)
    return torch.randint(3, vocabulary, (batch, length), generator=make)


def write_adapter(folder: Path) -> None:
    """A random adapter of rank 16 on all linears, small enough that the model stays one that knows nothing."""
    from tests.support.saved_adapters import save_random_adapter

    options: dict[str, object] = {
        "model_name": folder,
        "lora_rank": peers.RANK,
        "lora_alpha": ALPHA,
        "dataset": "dummy",
    }
    save_random_adapter(folder / "adapter", options, size=1e-3)


def logits_file(folder: Path, batch: int) -> Path:
    return folder / f"logits-{batch}.pt"


def row_of(asked: argparse.Namespace, system: str, batch: int, seconds: float, **more: object) -> None:
    length, new, _ = sizes(asked)
    row = {"system": system, "batch_size": batch, "prompt": length, "new": new, "seconds": round(seconds, 4),
           "tokens_per_second": round(batch * new / seconds, 1)}  # fmt: skip
    peers.append(asked.out, row | more | facts(asked, system))
    print(f"{system} batch {batch}: {batch * new / seconds:,.1f} tok/s {json.dumps(more)}", flush=True)


def facts(asked: argparse.Namespace, system: str) -> dict[str, object]:
    command = f"python -m benchmarks.generate --systems {system} --shape {asked.shape}"
    if system == "streamed":
        ranks = os.environ.get("WORLD_SIZE", "1")
        command = f"torchrun --nproc_per_node {ranks} -m benchmarks.generate --systems {system} --shape {asked.shape}"
    if asked.gpu_memory_gib is not None:
        command += f" --gpu_memory_gib {asked.gpu_memory_gib:g}"
    return peers.facts(asked, system) | {"command": command}


# ---- the systems


def ours(asked: argparse.Namespace) -> int:
    """Our tokens, and logits for the comparison."""
    from fsdp_qlora.runtime.launcher import choose_allocator

    choose_allocator()
    import torch

    from fsdp_qlora.config.options import Config, LaunchOptions, MemoryOptions, ModelOptions
    from fsdp_qlora.distributed.world import open_world
    from fsdp_qlora.generation.answers import Answers
    from fsdp_qlora.generation.needs import Workload
    from fsdp_qlora.generation.sampling import Sampling
    from fsdp_qlora.inference import build, fit_rows, read_base
    from fsdp_qlora.session import choose_compute

    length, new, batches = sizes(asked)
    folder: Path = asked.checkpoint
    memory = MemoryOptions(use_gradient_checkpointing=False, gpu_memory_gib=asked.gpu_memory_gib)
    with open_world(LaunchOptions(), 42) as world:
        config = Config(ModelOptions(""), memory=memory)
        base = read_base(str(folder / "adapter"), config.model, {"model_name": str(folder)}, config)
        base = replace(base, config=replace(base.config, data=replace(base.config.data, context_length=length)))
        built = build(base, world, choose_compute(base.config, world))
        world.say(f"blocks    {built.fusion}")
        most = max(batches)
        work = Workload(capacity=length + new, longest=length, count=most, asked=most)
        loaded = built.load(fit_rows(built, work))
        vocabulary = built.compute.hf_config.vocab_size
        for batch in batches:
            ids = prompts_of(vocabulary, batch, length)
            rows = [row.tolist() for row in ids]
            decoder = loaded.decoder(batch, length + new)
            compared = [decoder.prefill(rows, decoder.passes(rows))]
            tokens = [compared[0].argmax(-1)]
            for _ in range(FORCED):
                logits = decoder.step(tokens[-1])
                tokens.append(logits.argmax(-1))
            compared.append(logits)
            ends = [0, batch - 1]
            kept = {"prompt": ids[ends], "tokens": torch.stack(tokens[:-1], 1)[ends].cpu()}
            torch.save(kept | {"logits": [one[ends].cpu() for one in compared]}, logits_file(folder, batch))
            answers = Answers(decoder, Sampling(), [], new, world)
            best, made = float("inf"), 0
            for _ in range(4):  # the first captures the graph
                start = time.perf_counter()
                made = sum(len(answer.ids) for some in answers(rows) for answer in some)
                best = min(best, time.perf_counter() - start)
            assert made == batch * new
            synchronize = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
            start = time.perf_counter()
            decoder.prefill(rows, decoder.passes(rows))
            synchronize()
            prefill = time.perf_counter() - start
            row_of(asked, "ours", batch, best, prefill_seconds=round(prefill, 4),
                   step_ms=round((best - prefill) / (new - 1) * 1e3, 3), gpu_allocated_gib=allocated())  # fmt: skip
            del decoder, answers
    return 0


def by_peft(asked: argparse.Namespace) -> int:
    """PEFT's tokens; 1 if our logits are more than twice as far from a float32 model's as PEFT's."""
    import torch

    truth = load_peft(asked.checkpoint, torch.float32)
    batches = [batch for batch in sizes(asked)[2] if logits_file(asked.checkpoint, batch).exists()]
    truths = {batch: forced_logits(truth, torch.load(logits_file(asked.checkpoint, batch))) for batch in batches}
    del truth
    return timed(asked, "peft", load_peft(asked.checkpoint, torch.bfloat16), truths)


def load_peft(folder: Path, dtype: Any) -> Any:
    """Return the model with its adapter. Not `.to(dtype)`: that rounds the rotary frequencies too."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", device_map="cuda:0" if torch.cuda.is_available() else "cpu"
    )
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # of bitsandbytes; the checkpoint says bfloat16
            module.compute_dtype = dtype
    return PeftModel.from_pretrained(model, folder / "adapter", autocast_adapter_dtype=False).eval()


def by_unsloth(asked: argparse.Namespace) -> int:
    """Unsloth's tokens."""
    try:
        from unsloth import FastLanguageModel
    except ImportError as error:
        peers.append(asked.out, {"system": "unsloth", "failed": f"not installed: {error}"} | facts(asked, "unsloth"))
        return 0
    model = peers.load_unsloth(asked.checkpoint, False)
    FastLanguageModel.for_inference(model)
    return timed(asked, "unsloth", model)


def timed(asked: argparse.Namespace, system: str, model: Any, truths: dict[int, list[Any]] | None = None) -> int:
    """The rows of a Hugging Face model; 1 if our logits are not as good as its, against `truths` by batch."""
    import torch

    length, new, batches = sizes(asked)
    failed = 0
    for batch in batches:
        more: dict[str, object] = {}
        if truths and batch in truths:
            kept = torch.load(logits_file(asked.checkpoint, batch))
            ours, theirs = (
                [relative_error(*pair) for pair in zip(logits, truths[batch], strict=True)]
                for logits in (kept["logits"], forced_logits(model, kept))
            )
            more |= {"error": [round(one, 5) for one in theirs], "error_of_ours": [round(one, 5) for one in ours]}
            if not all(one <= 2 * other for one, other in zip(ours, theirs, strict=True)):
                more["failed"], failed = "our logits are less exact than PEFT's", 1
        ids = prompts_of(model.config.vocab_size, batch, length).to(model.device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new}
        best = float("inf")
        with torch.inference_mode():
            for _ in range(3):
                start = time.perf_counter()
                model.generate(**given, do_sample=False, pad_token_id=0)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - start)
        row_of(asked, system, batch, best, gpu_allocated_gib=allocated(), **more)
    return failed


def forced_logits(model: Any, kept: dict[str, Any]) -> list[Any]:
    """Return the logits behind the prompt, and behind the tokens of some steps; the model is given them whole."""
    import torch

    whole = torch.cat([kept["prompt"], kept["tokens"]], 1).to(model.device)
    with torch.inference_mode():
        logits = model(input_ids=whole).logits.float().cpu()
    return [logits[:, kept["prompt"].shape[1] - 1], logits[:, -1]]


def relative_error(one: Any, truth: Any) -> float:
    return float((one.double() - truth.double()).norm() / truth.double().norm())


def allocated() -> float | None:
    import torch

    return round(torch.cuda.max_memory_allocated() / peers.GIB, 2) if torch.cuda.is_available() else None


def streamed(asked: argparse.Namespace) -> None:
    """200 rows of a model that the cards do not hold, beside the link's floor."""
    from fsdp_qlora.runtime.launcher import choose_allocator

    choose_allocator()
    import torch
    from transformers import LlamaConfig

    from benchmarks.rig import SHAPES
    from fsdp_qlora.config.options import (
        AdapterOptions,
        Config,
        DataOptions,
        LaunchOptions,
        MemoryOptions,
        ModelOptions,
    )
    from fsdp_qlora.distributed.world import open_world
    from fsdp_qlora.generation.answers import Answers
    from fsdp_qlora.generation.needs import Workload
    from fsdp_qlora.generation.sampling import Sampling
    from fsdp_qlora.inference import Base, build, fit_rows
    from fsdp_qlora.memory.host_link import TRAFFIC
    from fsdp_qlora.session import choose_compute

    tiny = asked.shape == "tiny"
    rows, length = (9, TINY_PROMPT) if tiny else (STREAMED_ROWS, STREAMED_PROMPT)
    with tempfile.TemporaryDirectory() as folder, open_world(LaunchOptions(), 42) as world:
        LlamaConfig(**(SHAPES | {"tiny": peers.TINY})[asked.shape], rms_norm_eps=1e-5).save_pretrained(folder)
        memory = MemoryOptions(
            use_gradient_checkpointing=False, use_cpu_offload=True, gpu_memory_gib=asked.gpu_memory_gib
        )
        config = Config(
            ModelOptions(folder, dummy_weights=True), data=DataOptions(context_length=length), memory=memory,
            adapter=AdapterOptions(lora_rank=peers.RANK),
        )  # fmt: skip
        built = build(Base(config, None), world, choose_compute(config, world))
        fit = fit_rows(built, Workload(capacity=length + STREAMED_NEW, longest=length, count=rows))
        world.say(fit.line)
        loaded = built.load(fit)
        answers = Answers(loaded.decoder(fit.rows, length + STREAMED_NEW), Sampling(), [], STREAMED_NEW, world)
        ids = [row.tolist() for row in prompts_of(built.compute.hf_config.vocab_size, rows, length)]
        rate, start = link_rate(world.device), time.perf_counter()
        for _ in answers(ids[: world.size]):
            pass  # kernels are compiled here, and attention's backend is chosen
        first = time.perf_counter() - start
        before, start = TRAFFIC.to_device, time.perf_counter()
        made = sum(len(answer.ids) for some in answers(ids) for answer in some)
        seconds, moved = time.perf_counter() - start, TRAFFIC.to_device - before
        most = max(nbytes for (nbytes,) in world.gather([moved]))
        slowest = min(each for (each,) in world.gather([rate]))
        assert made == rows * STREAMED_NEW
        if world.is_main:
            floor = most / slowest if slowest else None
            row = {
                "system": "streamed", "ranks": world.size, "rows": rows, "prompt": length, "new": STREAMED_NEW,
                "rows_at_a_time": fit.rows, "first_seconds": round(first, 3), "seconds": round(seconds, 3),
                "streamed_gib": round(most / peers.GIB, 2),
                "link_gb_per_second": round(slowest / 1e9, 2), "floor_seconds": floor and round(floor, 3),
                "gpu_allocated_gib": allocated(), "gpu_memory_gib": asked.gpu_memory_gib,
            }  # fmt: skip
            peers.append(asked.out, row | facts(asked, "streamed"))
            print(json.dumps(row), flush=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def link_rate(device: Any) -> float:
    """Return bytes per second of copies from pinned memory, all ranks at the same time; 0 without a GPU."""
    import torch
    import torch.distributed as dist

    if device.type != "cuda":
        return 0.0
    source = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    dist.all_reduce(torch.zeros(1))
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(4):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 4 * source.numel() / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
