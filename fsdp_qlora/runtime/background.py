"""Threads beside the main thread: for jobs that a run which ends early does not wait for, and for parts of one job."""

import atexit
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def do_in_order(jobs: Sequence[Callable[[], T]], threads: int, device: torch.device) -> list[Future[T]]:
    """Start the jobs, in their order, on so many threads at once; one future for each.

    A job may call CUDA: the threads are on `device`, not on the first card, where a call would open a context. At exit
    the jobs that have been begun are waited for, and no others."""
    futures: list[Future[T]] = [Future() for _ in jobs]
    left: deque[tuple[Callable[[], Any], Future[Any]]] = deque(zip(jobs, futures, strict=True))
    # Those of an executor would do all jobs first.
    workers = [threading.Thread(target=_work, args=(left, device), daemon=True) for _ in range(min(threads, len(jobs)))]
    atexit.register(_end, left, workers)
    for worker in workers:
        worker.start()
    return futures


def _work(left: deque[tuple[Callable[[], Any], Future[Any]]], device: torch.device) -> None:
    while left:
        try:
            job, future = left.popleft()
        except IndexError:  # another thread was faster
            return
        try:
            if device.type == "cuda":  # here, for whoever waits for the result must learn where a driver refuses it
                torch.cuda.set_device(device)
            future.set_result(job())
        except BaseException as error:  # whoever asks for the result shall have it
            future.set_exception(error)
        del job, future


def _end(left: deque[tuple[Callable[[], Any], Future[Any]]], workers: Sequence[threading.Thread]) -> None:
    left.clear()
    for worker in workers:
        worker.join()


def beside(job: Callable[[], T], device: torch.device) -> Future[T]:
    """Start one job on a thread of its own."""
    return do_in_order([job], 1, device)[0]


@contextmanager
def torch_threads(count: int, each: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Yield `count` threads, in each of which PyTorch computes with `each` threads; wait for their work at the end.

    `torch.set_num_threads` counts for the thread that calls it and for those that begin later, so it is set back."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)
