"""Threads beside the main thread."""

import threading
from collections.abc import Callable

import pytest
import torch

from fsdp_qlora.runtime.background import torch_threads


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
