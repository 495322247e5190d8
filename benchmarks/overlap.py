"""What a GPU and its link do during one step: reads a trace of `train.py --profile --export_trace true`.

    python -m benchmarks.overlap trace_rank0.json.gz --out docs/overlap [--step 1]

Prints, and writes beside a picture, the share of the step in which the GPU multiplies, in which it computes at all, in
which the link copies either way and in which NCCL moves gradients, and the gaps in which nothing is computed, with what
comes before and after. Shares of time, not of work: two kernels at once count once.
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Span = tuple[float, float]  # begin and end, microseconds

# What a kernel does, by parts of its name; the first that fits.
KINDS = (
    ("NCCL", ("nccl",)),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitK")),
    ("dequantize", ("_dequantize_",)),
    ("norms, rope, SwiGLU", ("_forward_kernel", "_backward_kernel", "_rope_kernel", "_glu_lora_kernel")),
)
COPIES = {"Memcpy HtoD": "copies to the GPU", "Memcpy DtoH": "copies to the host", "Memcpy DtoD": "copies on the GPU"}
COMPUTE = ("matrix products", "attention", "dequantize", "norms, rope, SwiGLU", "other kernels")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where OUT.json and OUT.png go")
    parser.add_argument("--step", type=int, default=1, help="which of the recorded steps")
    asked = parser.parse_args()
    with gzip.open(asked.trace) as file:
        events = json.load(file)["traceEvents"]
    found = analyse(events, asked.step)
    asked.out.with_suffix(".json").write_text(json.dumps({k: v for k, v in found.items() if k != "spans"}, indent=1))
    draw(found["spans"], found["window"], asked.out.with_suffix(".png"))
    print(f"step of {found['ms']:.1f} ms")
    for kind, share in found["shares"].items():
        print(f"  {share:6.1%}  {kind}")
    for gap in found["gaps"]:
        print(f"  idle {gap['ms']:7.2f} ms at {gap['at_ms']:8.1f}: {gap['after'][:50]} -> {gap['before'][:50]}")
    return 0


def analyse(events: list[dict], step: int) -> dict:
    """Shares of one step's time by kind, and its largest gaps."""
    begin, end = window(events, step)
    spans: dict[str, list[Span]] = defaultdict(list)
    named: list[tuple[float, float, str]] = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        start, stop = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
        if start >= stop:
            continue
        kind = kind_of(event["name"])
        spans[kind].append((start, stop))
        if kind in COMPUTE:
            named.append((start, stop, event["name"]))
    merged = {kind: union(parts) for kind, parts in spans.items()}
    computing = union([span for kind in COMPUTE for span in merged.get(kind, [])])
    link = union([span for kind in ("copies to the GPU", "copies to the host") for span in merged.get(kind, [])])
    shares = {kind: total(parts) / (end - begin) for kind, parts in sorted(merged.items())}
    shares |= {"computing at all": total(computing) / (end - begin), "link busy": total(link) / (end - begin)}
    return {
        "ms": (end - begin) / 1e3, "shares": shares, "gaps": gaps(sorted(named), begin, end), "spans": merged,
        "window": (begin, end),
    }  # fmt: skip


def window(events: list[dict], step: int) -> Span:
    """From the first kernel after the host began this step to the first after it began the next one.

    The host waits for the GPU once in a step, at its end, so the two are never far apart there."""
    marks = [e for e in events if e.get("cat") == "user_annotation" and str(e["name"]).startswith("ProfilerStep")]
    begins = [*sorted(mark["ts"] for mark in marks), max(mark["ts"] + mark["dur"] for mark in marks)]
    kernels = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel")
    first = next(begin for begin, _ in kernels if begin >= begins[step])
    return first, next((begin for begin, _ in kernels if begin >= begins[step + 1]), kernels[-1][1])


def kind_of(name: str) -> str:
    for start, kind in COPIES.items():
        if name.startswith(start):
            return kind
    lowered = name.lower()
    return next((kind for kind, parts in KINDS if any(part.lower() in lowered for part in parts)), "other kernels")


def union(spans: list[Span]) -> list[Span]:
    merged: list[list[float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return [(a, b) for a, b in merged]


def total(spans: list[Span]) -> float:
    return sum(stop - start for start, stop in spans)


def gaps(named: list[tuple[float, float, str]], begin: float, end: float, most: int = 12) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    reached, last = begin, "start of the step"
    for start, stop, name in [*named, (end, end, "end of the step")]:
        if start > reached:
            found.append(
                {"ms": (start - reached) / 1e3, "at_ms": (reached - begin) / 1e3, "after": last, "before": name}
            )
        if stop > reached:
            reached, last = stop, name
    short = sum(gap["ms"] for gap in found if gap["ms"] < 0.1)
    found = sorted(found, key=lambda gap: -gap["ms"])[:most]
    return [*found, {"ms": short, "at_ms": 0.0, "after": "all gaps under 0.1 ms", "before": "together"}]


def draw(spans: dict[str, list[Span]], window: Span, target: Path) -> None:
    rows = [kind for kind in (*COMPUTE, "copies to the GPU", "copies to the host", "NCCL") if kind in spans]
    figure, axes = plt.subplots(figsize=(14, 0.45 * len(rows) + 1.2))
    for place, kind in enumerate(reversed(rows)):
        bars = [((start - window[0]) / 1e3, (stop - start) / 1e3) for start, stop in spans[kind]]
        axes.broken_barh(bars, (place - 0.4, 0.8), linewidth=0.4, edgecolor="C0", snap=False)  # thin ones show
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_xlabel("ms of the step")
    axes.set_xlim(0, (window[1] - window[0]) / 1e3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
