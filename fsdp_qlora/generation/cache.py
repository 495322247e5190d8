"""Keys and values of the tokens that rows have so far, in place for the tokens to come.

B rows, C tokens that a row has place for, K key/value heads, D head dim, T tokens that come together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fsdp_qlora.models.fused.spec import BlockSpec


class KVCache:
    """Keys and values [B, C, K, D] of each block. Token t of row b is at place t, whatever the other rows' lengths.

    Zeros where there is no token yet: what attention leaves out must be finite all the same."""

    def __init__(
        self, specs: Sequence[BlockSpec], rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.capacity = rows, capacity
        shapes = [(rows, capacity, spec.attention.kv_heads, spec.attention.head_dim) for spec in specs]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    def write(self, block: int, places_T: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep k and v [T, K, D] of a block. places_T: int64, row * C + token of each."""
        for kept, new in ((self.keys[block], k), (self.values[block], v)):
            kept.view(-1, *kept.shape[2:]).index_copy_(0, places_T, new)

    @staticmethod
    def row_bytes(specs: Sequence[BlockSpec], capacity: int, dtype: torch.dtype) -> int:
        """Return the bytes that a row takes."""
        numbers = sum(spec.attention.kv_heads * spec.attention.head_dim for spec in specs)
        return 2 * numbers * capacity * dtype.itemsize
