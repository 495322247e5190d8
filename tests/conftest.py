"""What every test runs under: Triton's interpreter where there is no GPU, and NaN in all memory nobody has written."""

import gc
import os
from contextlib import contextmanager

import pytest
import torch

from fsdp_qlora.runtime.launcher import keep_cpu_products_inside
from fsdp_qlora.runtime.libraries import leave_out_compiler
from tests.support.tiers import COLLECTED, mark_ranks

keep_cpu_products_inside()
leave_out_compiler()  # here and in all processes that tests start: TorchInductor takes each a second of its start
if not torch.cuda.is_available():
    # Must be set before a kernel is decorated, so before any test module imports one.
    os.environ["TRITON_INTERPRET"] = "1"
    # Tensors are small: threads would wait for each other most of the time, here and in processes that tests start.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put each test into its tier before -m selects from them; skip what needs a GPU where there is none."""
    mark_ranks(items)
    config.stash[COLLECTED] = list(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_collection_finish() -> None:
    """Let garbage collections look at what tests make, and no more at the libraries: hqq collects after each linear."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty and its kin give NaN (the largest value for integers): a kernel that skips an element is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """For tests of small tensors, where threads that wait for each other would take most of the time."""
    with on_one_thread():
        yield


@pytest.fixture(scope="module")
def one_thread_throughout():
    """The same for a module's fixtures too."""
    with on_one_thread():
        yield


@pytest.fixture
def triton_device():
    """A device whose tensors go through the Triton kernels: the GPU, or the CPU through the interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from fsdp_qlora.kernels.device import interpreting

    with interpreting():
        yield torch.device("cpu")
