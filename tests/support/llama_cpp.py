"""llama.cpp itself, out of the package cyllama, on a GGUF file: its tokens and its logits."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from cyllama.llama import llama_cpp
from torch import Tensor

llama_cpp.disable_logging()


class _Model(llama_cpp.LlamaModel):
    """With what LlamaContext.get_logits_ith of cyllama 0.2.18 reads off it and its class does not have."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


class LlamaCpp:
    """A GGUF file, open."""

    def __init__(self, file: Path) -> None:
        settings = llama_cpp.LlamaModelParams()
        settings.n_gpu_layers = 0
        self.model = _Model(str(file), settings)
        self.vocab = self.model.get_vocab()

    def tokens(self, text: str) -> list[int]:
        return list(self.vocab.tokenize(text, True, True))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[positions, vocabulary], float32."""
        settings = llama_cpp.LlamaContextParams()
        settings.n_ctx, settings.n_batch, settings.n_threads = 256, 256, 1
        settings.type_k = settings.type_v = 0  # float32 of the KV cache, which is float16 else
        settings.flash_attn_type = 0  # none: it rounds queries to float16
        context = llama_cpp.LlamaContext(self.model, settings)
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(list(ids), 0, True)
        assert context.decode(batch) == 0
        rows = [np.array(context.get_logits_ith(i), dtype=np.float32) for i in range(len(ids))]
        return torch.from_numpy(np.stack(rows))


def quantized(file: Path, target: Path, file_type: int) -> Path:
    """What llama.cpp's own llama-quantize makes of a file; the target."""
    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = file_type, 1
    llama_cpp.model_quantize(str(file), str(target), settings)
    return target
