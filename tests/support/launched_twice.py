"""Launches with the installed Triton on a card that is not there: in Triton's way and in ours, which must be the same.

Kernels are compiled for a real card; the driver notes what it is given. Run as a program, without TRITON_INTERPRET.
"""

import itertools
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fsdp_qlora.kernels import quick_launch as module
from fsdp_qlora.kernels.dropout import _dropout_kernel

STREAM = 5
launched: list[tuple[Any, ...]] = []


class Launcher:
    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *given: Any) -> None:
        grid_and_form, told, args = given[:6], given[6:9], given[9:]  # told: for hooks, which ours has none of
        assert len(told) == 3
        launched.append((*grid_and_form, *args))


class Utils:
    handles = itertools.count(100)

    def load_binary(self, *_: object) -> tuple[int, ...]:
        return 1, next(self.handles), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10}

    def unload_module(self, module: int) -> None:
        pass


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 86, 32)


def main() -> None:
    driver.set_active(Driver())
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[method-assign]
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM  # type: ignore[method-assign]
    assert module.KNOWN, "its names would have to be read"
    floats, halves = torch.zeros(4096), torch.zeros(4096, dtype=torch.float16)
    kinds: list[tuple[torch.Tensor, int, int, dict[str, int]]] = [
        (floats, 160, 7, {}), (floats[1:], 160, 7, {}), (halves, 160, 7, {}), (floats, 161, 7, {}), (floats, 1, 7, {}),
        (floats, 160, 2**40, {}), (floats, 160, 7, {"num_warps": 8}), (floats, 160, 7, {"ADD": True}),
    ]  # fmt: skip
    for x, n, seed, more in kinds * 3:
        grid, args, options = (3, 2), (x, x, n, 0.5, 2.0, seed), {"ADD": False, "TILE": 1024} | more
        launched.clear()
        module.quick_launch(_dropout_kernel, grid, args, options)
        _dropout_kernel[grid](*args, **options)
        assert len(launched) == 2, "each way launches once"
        ours, triton_s = launched
        assert ours == triton_s, f"{ours} where Triton gives {triton_s}"
    (forms,) = module._compiled.values()
    assert len({id(form) for form in forms.values()}) == len(kinds), "a form for each kind of arguments"
    print(f"{len(kinds)} forms, the same launches")


if __name__ == "__main__":
    main()
