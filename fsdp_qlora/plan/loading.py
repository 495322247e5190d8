"""Bytes on a GPU while weights are loaded and encoded."""

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.weights.codecs import codec_named

PLAIN = {2: "bfloat16", 4: "float32"}  # a codec whose numbers have so many bytes


class Loading:
    """Bytes of a GPU that are there only while a unit is loaded: its own, scratch to encode it, those of another unit.

    Embedding and head are encoded alone, blocks by all ranks at the same time: another rank's block arrives beside this
    rank's own. From the base cache comes any unit beside the next one. A checkpoint's weights are brought from host
    memory in pieces; random ones are made on the device, one at a time.
    first: the embedding, before anything stays. block; head: when all blocks are where they stay."""

    def __init__(self, facts: Facts) -> None:
        f = facts
        largest = max(f.qkv if f.qkv_linears == 1 else f.queries, f.intermediate * (3 - f.gate_up_linears)) * f.hidden
        self.scratch = _scratch(f.codec, largest, f)
        if ADAPTERS[f.adapter].reads_norms:  # of a weight, decoded once its encoding is among the unit's bytes
            self.scratch = max(self.scratch, largest * f.compute_bytes)
        table = _scratch(PLAIN[f.stream_bytes], f.vocabulary * f.hidden, f)
        cached = 0 if f.dummy_weights else f.block_bytes  # random weights are not kept
        self.first = f.embedding_bytes + max(table, cached)
        self.block = f.block_bytes + max(self.scratch, f.block_bytes if f.ranks > 1 else cached)
        self.head = f.head_bytes + max(table, cached) if f.head_bytes else 0


def _scratch(codec: str, numbers: int, facts: Facts) -> int:
    """Return the bytes that encoding one weight takes beside its unit's, itself included where it is on the GPU."""
    size = facts.stream_bytes
    beside = codec_named(codec).encode_scratch_bytes((numbers,), size, facts.dummy_weights)
    return beside + numbers * size if facts.dummy_weights else beside
