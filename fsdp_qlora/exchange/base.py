"""Protocols of an exchange of tensors between ranks, and of one that is under way."""

from typing import Protocol

from torch import Tensor


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> object:
        """Make the current stream (without a GPU: the caller) wait until the exchange is done."""
        ...

    def is_completed(self) -> bool: ...


class Exchange(Protocol):
    """The all-gather and the reduce-scatter of adapters. Every rank calls both in the same order.

    Neither waits: the tensors must live until the returned `Pending` is done."""

    # Whether reduce_scatter accumulates in the dtype of `shard`, so that `whole` may be narrower at no loss.
    widens: bool

    def all_gather(self, whole: Tensor, shard: Tensor) -> Pending:
        """Fill whole [ranks x n] with every rank's `shard` [n], in rank order; `shard` may be a part of `whole`."""
        ...

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> Pending:
        """Fill shard [n] with the sum over the ranks of part `rank` of their `whole` [ranks x n]."""
        ...

    def release_waits(self) -> None:
        """Release the streams of this rank's GPU that wait for a peer which is gone."""
        ...
