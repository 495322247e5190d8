"""Tiny models, a byte tokenizer and a handful of rows, made on the spot: everything a run needs, in a second."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # far from the default 0.02, at which a random model's logits hardly depend on its input
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def save_model(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """A random model of `config` with its byte tokenizer, saved as Hugging Face does; the folder."""
    torch.manual_seed(0)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    model = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which hide a mix-up
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **saving)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One token a byte: 0 pad, 1 BOS (put before every text), 2 EOS, 3 to 258 the bytes."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], bos_token=specials[1], eos_token=specials[2]
    ).save_pretrained(folder)


def save_rows(file: Path, count: int) -> Path:
    """prompt/completion rows of very unequal lengths (5 to 60 bytes), so that a mean of means is not the mean."""
    draw = random.Random(0)
    words = ["ant", "bee", "cow", "doe", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    with file.open("w") as out:
        for _ in range(count):
            prompt = " ".join(draw.choices(words, k=draw.randint(1, 4)))
            completion = " ".join(draw.choices(words, k=draw.choice([1, 1, 2, 3, 9])))
            out.write(json.dumps({"prompt": f"{prompt}:", "completion": completion}) + "\n")
    return file
