"""Launches past Triton's own way: the same compiled form for the same kind of arguments, and Triton's way where due."""

import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

from fsdp_qlora.kernels import quick_launch as module
from fsdp_qlora.kernels.quick_launch import quick_launch
from fsdp_qlora.kernels.rms_norm import rms_norm_forward
from tests.support.truth import assert_as_good_as_plain

pytest.importorskip("triton")


class Compiled:
    function, packed_metadata = 7, (4, 1)

    def __init__(self):
        self.launched = []

    def run(self, *given):
        self.launched.append(given)


class Kernel:
    """As Triton's: a binder tells what kind of arguments these are, a call compiles and launches."""

    def __init__(self):
        self.device_caches = defaultdict(lambda: ({}, {}, None, None, self.bind))
        self.called, self.pre_run_hooks = [], []

    @staticmethod
    def bind(a, n, SIZE, **options):
        return {"a": a, "n": n, "SIZE": SIZE}, [("i", a % 16 == 0), ("i", n == 1), ("constexpr", SIZE)], options

    def __getitem__(self, grid):
        def call(*args, **options):
            self.called.append((grid, args, options))
            return Compiled()

        return call


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    return Kernel()


def test_the_first_of_a_kind_goes_triton_s_way_and_others_run_what_it_compiled(kernel):
    for a in (16, 32, 48):
        quick_launch(kernel, (3, 2), (a, 9), {"SIZE": 4, "num_warps": 8})
    (found,) = module._compiled[id(kernel)].values()
    assert kernel.called == [((3, 2), (16, 9), {"SIZE": 4, "num_warps": 8})]
    assert found.launched == [(3, 2, 1, 5, 7, (4, 1), None, None, None, a, 9, 4) for a in (32, 48)]


@pytest.mark.parametrize("args", [(17, 9), (16, 1)], ids=["alignment", "one"])
@pytest.mark.parametrize("options", [{"SIZE": 4}, {"SIZE": 8}, {"SIZE": 4, "num_warps": 8}], ids=str)
def test_another_kind_is_compiled_for_itself(args, options, kernel):
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    quick_launch(kernel, (1,), args, options)
    assert len(kernel.called) == 2


def test_a_profiler_and_an_unknown_triton_get_every_launch(kernel, monkeypatch):
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    hooks = module.knobs.runtime.launch_enter_hook
    hooks.add(print)
    try:
        quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    finally:
        hooks.remove(print)
    monkeypatch.setattr(module, "KNOWN", False)
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    assert len(kernel.called) == 3


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_s_own_function_in_place_of_triton_s_list_gets_every_launch(hook, kernel, monkeypatch):
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    monkeypatch.setattr(module.knobs.runtime, hook, print)
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    assert len(kernel.called) == 2
    monkeypatch.setattr(module.knobs.runtime, hook, None)
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    assert len(kernel.called) == 2, "there is nothing to be told"
    kernel.pre_run_hooks.append(print)
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    assert len(kernel.called) == 3


def test_debugging_is_compiled_for_itself(kernel, monkeypatch):
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    monkeypatch.setattr(module.knobs.runtime, "debug", True)
    quick_launch(kernel, (1,), (16, 9), {"SIZE": 4})
    assert len(kernel.called) == 2


def test_a_triton_that_is_not_known_is_said_to_be_slower(monkeypatch):
    assert module.slower_launches() == ""
    monkeypatch.setattr(module, "KNOWN", False)
    monkeypatch.setattr(module, "VERSION", "4.0.0")
    assert "triton 4.0.0 is none of 3.6 to 3.9" in module.slower_launches()


@pytest.mark.slow
def test_the_installed_triton_is_given_what_it_gives_itself(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.launched_twice"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "8 forms, the same launches", done.stderr


@pytest.mark.gpu
def test_memory_that_begins_anywhere_is_read_and_written_right():
    weight = torch.randn(256, device="cuda").bfloat16()
    for start in (0, 8, 1, 0, 3):
        x = torch.randn(5 * 256 + 8, device="cuda").bfloat16()[start : start + 5 * 256].view(5, 256)
        for dtype in (torch.bfloat16, torch.float32):
            given = x.to(dtype) if dtype != x.dtype else x
            out = rms_norm_forward(given, weight.to(dtype), 1e-5)
            plain = [
                torch.nn.functional.rms_norm(given.to(k), (256,), weight.to(k), 1e-5) for k in (dtype, torch.float64)
            ]
            assert_as_good_as_plain(out, *plain, f"from {start}")
