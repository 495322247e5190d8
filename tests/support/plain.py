"""The oracle: training with transformers + PEFT + bitsandbytes or hqq, nothing of ours but adapters' first values.

bitsandbytes quantizes the model as `from_pretrained` does, and what it decodes goes into plain linears under PEFT: on
CPUs with AVX512-BF16 its own `Linear4bit` repacks its weight and loses the gradient. Rows go through the model one at
a time, unpadded, and the loss is the mean over the step's label tokens.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
import torch.nn.functional as F
from hqq.core.quantize import HQQLinear, hqq_base_quant_config
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from tests.support.first_values import first_values
from tests.support.truth import DEVICE

Row = tuple[list[int], list[int]]  # token ids, and the label of each (-100: none)


@dataclass
class Recipe:
    """What is trained and how; the defaults are those of `OPTIONS` in test_fidelity.py."""

    quantized: bool = True
    double_quant: bool = True
    hqq: tuple[int, int, int] | None = None  # bits, group size and axis of hqq's codes, in place of bitsandbytes'
    hqq_optimize: bool = True
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    targets: str | list[str] = "all-linear"
    lr: float = 5e-3
    weight_decay: float = 0.0
    clip: float | None = 1.0
    warmup: int = 1
    steps: int = 20
    rows_per_step: int = 4
    seed: int = 42


@dataclass
class Outcome:
    """Of each step the loss and the gradient's norm before clipping; the model as it is at the end."""

    model: PeftModel
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def load_base(
    folder: Path, recipe: Recipe, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> PreTrainedModel:
    """The Hugging Face model of a folder, its linears as bitsandbytes or hqq has them, everything in `dtype`."""
    model = auto_class(folder).from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    if recipe.hqq is not None:
        for linear in decoder_linears(model):
            linear.weight.data.copy_(as_hqq(linear.weight.data, recipe, dtype))
    elif recipe.quantized:
        for name, linear in load_quantized(folder, recipe).named_modules():
            if isinstance(linear, bnb.nn.Linear4bit):
                weight = model.get_submodule(name).weight
                weight.data.copy_(decoded(linear).view_as(weight))
    return model


def auto_class(folder: Path) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Return what a user opens the folder with: causal LMs where transformers has one for it, else wrappers of one."""
    causal = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def decoder_linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]


def as_hqq(weight: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """What hqq's own linear of that weight decodes to, on the device that our runs quantize on."""
    return hqq_linear(weight, recipe, dtype).dequantize().to(weight.device)


def hqq_linear(weight: Tensor, recipe: Recipe, dtype: torch.dtype) -> HQQLinear:
    assert recipe.hqq is not None
    bits, group, axis = recipe.hqq
    settings = hqq_base_quant_config(bits, group, axis=axis)
    settings["weight_quant_params"]["optimize"] = recipe.hqq_optimize
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.to(DEVICE, copy=True)
    return HQQLinear(linear, settings, compute_dtype=dtype, device=str(DEVICE))


def decoded(linear: bnb.nn.Linear4bit) -> Tensor:
    """What bitsandbytes decodes, as one long row: on CPUs its 2-D form is wrong where rows are no multiple of 64."""
    state = copy.copy(linear.weight.quant_state)
    state.shape = (linear.weight.quant_state.shape.numel(),)
    return bnb.functional.dequantize_4bit(linear.weight.data, state)


def load_quantized(folder: Path, recipe: Recipe) -> PreTrainedModel:
    """The model as `from_pretrained` quantizes it and decodes it to float32; saved, it is a *-bnb-4bit one.

    On the device that our runs quantize on: bitsandbytes' kernels for CPUs and for GPUs round the scales of double
    quantization to different codes."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=recipe.double_quant
    )
    return auto_class(folder).from_pretrained(
        folder, dtype=torch.float32, device_map=str(DEVICE), quantization_config=settings
    )


def with_adapters(base: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """`base` under PEFT, its adapters at the values that our runs start from."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        target_modules=recipe.targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    values = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            first = first_values(name, module.out_features, module.in_features, recipe.rank, recipe.seed)
            values |= {f"base_model.model.{name}.{matrix}.weight": value for matrix, value in first.items()}
    assert not set_peft_model_state_dict(model, values).unexpected_keys
    return model


def train(folder: Path, rows: Sequence[Row], recipe: Recipe, dtype: torch.dtype = torch.float32) -> Outcome:
    """AdamW, cosine after a linear warm-up, clipping. With a 16-bit `dtype` the adapters have float32 master copies."""
    model = with_adapters(load_base(folder, recipe, dtype), recipe)
    working = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().clone().requires_grad_() for p in working]
    for p in working:
        p.data = p.data.to(dtype)
    optimizer = torch.optim.AdamW(masters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    outcome = Outcome(model)
    for step in range(recipe.steps):
        chosen = [rows[i] for i in rows_of_step(len(rows), step, recipe)]
        labels = sum(label != -100 for _, row_labels in chosen for label in row_labels)
        total = 0.0
        for ids, row_labels in chosen:
            loss = summed_loss(model, ids, row_labels) / labels
            loss.backward()
            total += loss.item()
        for master, p in zip(masters, working, strict=True):
            master.grad, p.grad = p.grad.float(), None
        norm = nn.utils.clip_grad_norm_(masters, recipe.clip or math.inf)
        for settings in optimizer.param_groups:
            settings["lr"] = recipe.lr * schedule(step, recipe)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, working, strict=True):
                p.copy_(master)
        outcome.losses.append(total)
        outcome.norms.append(norm.item())
    return outcome


def summed_loss(model: nn.Module, ids: list[int], labels: list[int]) -> Tensor:
    """The sum of the cross-entropies at the labels of one row.

    In float64: PyTorch's float32 cross-entropy is 1e-5 off per token at SmolLM2's vocabulary on a CPU.
    """
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return F.cross_entropy(logits[:-1].double(), torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")


def rows_of_step(count: int, step: int, recipe: Recipe) -> list[int]:
    """The rows of an optimizer step: consecutive ones of the epoch's permutation, fewer in an epoch's last step."""
    steps_per_epoch = math.ceil(count / recipe.rows_per_step)
    epoch, index = divmod(step, steps_per_epoch)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(count)
    return order[index * recipe.rows_per_step : (index + 1) * recipe.rows_per_step].tolist()


def schedule(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return step / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)))


def read_rows(file: Path, folder: Path, context: int) -> list[Row]:
    """prompt/completion rows as tokens: BOS if the tokenizer has one, prompt, completion, EOS; loss on the last two."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(((prompt + answer)[:context], ([-100] * len(prompt) + answer)[:context]))
    return rows
