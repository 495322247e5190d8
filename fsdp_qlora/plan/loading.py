"""Bytes on a GPU while weights are loaded and encoded."""

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.weights.codecs import codec_named


class Loading:
    """Working bytes while a unit is encoded on a GPU: its weights as read, its bytes, the next unit's weights.

    Random weights are made on the device, a unit ahead; a checkpoint's are in host memory, one on the device at a time.
    With several ranks another's block arrives beside this rank's own. first: the embedding, before anything stays.
    block; head: when all blocks are where they stay; no block is read ahead of it."""

    def __init__(self, facts: Facts) -> None:
        f = facts
        received = 0 if f.ranks == 1 else 1
        dense = f.linear_numbers * f.stream_bytes
        largest = max(f.qkv if f.qkv_linears == 1 else f.queries, f.intermediate * (3 - f.gate_up_linears)) * f.hidden
        # One weight's, not yet among the unit's bytes.
        self.parts = codec_named(f.codec).encode_scratch_bytes((largest,))
        if ADAPTERS[f.adapter].reads_norms:  # of a weight, decoded once its encoding is among the unit's bytes
            self.parts = max(self.parts, largest * f.compute_bytes)
        self.first = (2 + received) * f.embedding_bytes + (dense if f.dummy_weights else 0)
        weights = 2 * dense if f.dummy_weights else largest * f.stream_bytes
        self.block = weights + self.parts + f.block_bytes * (1 + received)
        self.head = 2 * f.head_bytes
