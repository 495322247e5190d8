"""The beginning of a safetensors file, from shapes alone: for files that are written tensor by tensor.

The library's own `save_file` wants all tensors of a file in host memory at once: 5 GB of a model's file, or of a rank's
optimizer state at 70B. The format (github.com/huggingface/safetensors, README: Format) is a header, which is known
before the first tensor is, and the tensors' bytes one after the other.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch

# The format's names of dtypes.
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Form(NamedTuple):
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def header(forms: Mapping[str, Form], notes: Mapping[str, str] | None = None, multiple_of: int = 8) -> bytes:
    """Return the beginning of a file of these tensors, whose bytes follow in this order.

    notes: what the file says beside its tensors. multiple_of: bytes, of which the beginning takes a multiple."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(notes or {})}}
    offset = 0
    for name, form in forms.items():
        end = offset + form.nbytes
        entries[name] = {"dtype": NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % multiple_of)
    return len(text).to_bytes(8, "little") + text
