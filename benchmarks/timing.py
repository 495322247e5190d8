"""What a benchmark of an op needs: how long a call takes, what the device can do at best, and what ran where."""

import contextlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata

import torch

Call = Callable[[], object]


def milliseconds(calls: Sequence[Call], repeats: int = 20, capture: bool = True) -> float:
    """Median time of one call. calls: the same work on different memory, so that none finds its input in the cache.

    On a GPU the calls are captured into one CUDA graph, so that what is timed is the kernels and not Python; work that
    cannot be captured, or is not to be, is timed as it is launched."""
    for call in calls:
        call()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    run = (_captured(calls) if capture else None) or (lambda: [call() for call in calls])
    run()
    times = []
    for _ in range(max(3, repeats // len(calls))):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return sorted(times)[len(times) // 2]


def _captured(calls: Sequence[Call]) -> Call | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph.replay


def copies(n_bytes: int) -> int:
    """How many sets of inputs of `n_bytes` it takes that the L2 cache (50 MB on an H200) has forgotten the first."""
    return max(1, min(16, (256 << 20) // max(n_bytes, 1)))


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and bytes written both counted: the floor of everything bound by memory.

    The faster of two ways. `copy_` as it is launched: in a CUDA graph it would be a memcpy node, which does 2,757 GB/s
    on an H200 where the launched copy does 4,260. And a kernel that reads a tensor and writes another of its size."""
    n = (1 << 30) if device.type == "cuda" else (1 << 20)
    source = torch.ones(n // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copied = milliseconds([lambda: target.copy_(source)], capture=False)
    negated = milliseconds([lambda: torch.neg(source, out=target)])
    return 2 * n / min(copied, negated) / 1e6


def matmul_rate(device: torch.device) -> float:
    """TFLOP/s of a bf16 8192^3 product."""
    n = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / milliseconds([lambda: torch.mm(a, b, out=out)]) / 1e9


def environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }
    for package in ("torch", "triton", "transformers", "bitsandbytes", "hqq", "liger_kernel", "unsloth"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
