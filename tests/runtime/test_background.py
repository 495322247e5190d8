"""Threads beside the main thread."""

import threading
from collections.abc import Callable

import pytest
import torch

from fsdp_qlora.runtime.background import do_in_order, torch_threads


def in_a_new_thread(function: Callable[[], int]) -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("fails", [False, True])
def test_pytorch_computes_with_as_many_threads_as_before_once_they_end(fails):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch_threads(2, each=1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    finally:
        found = torch.get_num_threads(), in_a_new_thread(torch.get_num_threads)
        torch.set_num_threads(threads)
    assert found == (3, 3)


def test_a_thread_that_cannot_have_its_device_leaves_no_job_without_a_result(monkeypatch):
    def refuses(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "set_device", refuses)
    for future in do_in_order([lambda: 1] * 3, 2, torch.device("cuda", 0)):
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(timeout=10)
