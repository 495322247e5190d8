"""A launch of a Triton kernel that takes the host some 4 us less than Triton's own (docs/LOG.md, 2026-11-28).

`kernel[grid](...)` reads environment variables, formats options, looks up globals and calls two empty lists of hooks at
every launch. What remains is what decides which compiled form runs: Triton's own binder, which knows the arguments'
types, alignments and constants. Settings that change how a kernel is compiled count from its first launch of a kind,
but for `triton.knobs.runtime.debug`, which counts at once.

It uses names that Triton keeps private, as versions 3.6 to 3.9 have them; with any other version kernels are launched
in Triton's way.
"""

from typing import Any

import torch

try:
    import triton
    from triton import knobs

    VERSION: str = triton.__version__
except ImportError:
    VERSION = ""

KNOWN = VERSION.startswith(("3.6.", "3.7.", "3.8.", "3.9."))

_compiled: dict[int, dict[tuple[object, ...], Any]] = {}  # by kernel (of a module, so it lives on): by what it is for


def quick_launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Do what `kernel[grid](*args, **options)` does. args: on the current GPU."""
    if not KNOWN or _is_watched(kernel):
        kernel[grid](*args, **options)
        return
    device = torch._C._cuda_getDevice()
    bound, specialization, other = kernel.device_caches[device][4](*args, **options)
    key = (device, knobs.runtime.debug, *specialization, *other.items())
    known = _compiled.setdefault(id(kernel), {})
    found = known.get(key)
    if found is None:
        known[key] = kernel[grid](*args, **options)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    found.run(x, y, z, stream, found.function, found.packed_metadata, None, None, None, *bound.values())


def slower_launches() -> str:
    """Return why launches take the host longer than they might, for the user; "" where they do not."""
    if KNOWN:
        return ""
    return (
        f"kernels   triton {VERSION} is none of 3.6 to 3.9, whose launches are known: it launches them in its own way, "
        "which takes the host some 4 us more for each, and a tenth more for a step that waits for the host"
    )


def _is_watched(kernel: Any) -> bool:
    """Return whether a profiler wants to be told of launches: Triton calls its lists of hooks, empty or not.

    A profiler may also have put a function of its own, or None, in the place of such a list."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
