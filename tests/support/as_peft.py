"""One comparison for every model: loss and adapter gradients of ours against the same model under transformers + PEFT.

Two rows of unequal length in one padded batch on our side, one after the other and unpadded on theirs; float32."""

from pathlib import Path

import pytest
import torch

from fsdp_qlora.models.fused.fuse import Fusion
from tests.support import plain
from tests.support.built import built
from tests.support.runs import Options

# Relative error of the loss and of each gradient as a whole; up to twice that for a model that amplifies rounding so
# much that its own gradients move as far when last bits of its embedding do (MiniCPM3: 4e-5).
CLOSE = 3e-5
LAST_BIT = 2.0**-24
FURTHEST = 1e-4  # of a gradient's largest number: error of any of its numbers
ROWS = (40, 23)  # tokens
PROMPT = 3  # tokens of a row without labels


def assert_trains_as_peft(
    folder: Path, train_type: str = "qlora", attention: str | None = "eager", **options: object
) -> Fusion:
    """Compare the model of a folder at random adapters of rank 8 on all linears of its decoder layers.

    attention: theirs; eager can do what every family does. Adapters that PEFT makes elsewhere (in a vision tower) are
    zero and have no part."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 259, (length,), generator=draw).tolist() for length in ROWS]
    count = sum(ROWS) - PROMPT * len(ROWS)
    recipe = plain.Recipe(quantized=train_type == "qlora")
    theirs = plain.with_adapters(plain.load_base(folder, recipe, attention=attention), recipe)
    values = {path: p for path, p in theirs.named_parameters() if p.requires_grad}
    for path, p in values.items():
        if "lora_B" in path:  # zero at the start, where A has no gradient
            torch.nn.init.normal_(p, std=0.1, generator=draw)
    ours_alone: Options = {"model_name": folder, "train_type": train_type, "dataset": "dummy", "lora_rank": 8}
    with built(ours_alone | {"precision": "fp32", "context_length": max(ROWS)} | options) as ours:
        paths = [path for group in ours.adapters.groups for path in group.names]
        assert {peft_name(path) for path in paths} <= values.keys()
        for path in values.keys() - {peft_name(path) for path in paths}:
            torch.nn.init.zeros_(values[path])
        wanted = sum(plain.summed_loss(theirs, ids, [-100] * PROMPT + ids[PROMPT:]) for ids in rows) / count
        wanted.backward()
        truths = {path: values[peft_name(path)].grad.clone() for path in paths}
        ours.adapters.load({path: values[peft_name(path)].detach() for path in paths})
        ids = torch.zeros(len(ROWS), max(ROWS), dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, PROMPT : len(row)] = torch.tensor(row[PROMPT:])
        loss = ours.loss(ids, labels, count)
        gradients = ours.backward(loss)
    assert loss.item() == pytest.approx(wanted.item(), rel=CLOSE)
    assert len(gradients) == len(paths) > 0
    uncertain: dict[str, float] = {}
    for path, gradient in gradients.items():
        truth = truths[path]
        assert truth.abs().max() > 0, f"{path}: nothing to compare"
        assert max_of(gradient - truth) < FURTHEST * max_of(truth), path
        error, size = torch.linalg.vector_norm(gradient - truth), torch.linalg.vector_norm(truth)
        if error >= CLOSE * size:
            uncertain[path] = (error / size).item()
    if uncertain:
        theirs.zero_grad()
        with torch.no_grad():
            embedding = theirs.get_input_embeddings().weight
            embedding.mul_(1 + LAST_BIT * torch.randn(embedding.shape, generator=draw).sign())
        (sum(plain.summed_loss(theirs, ids, [-100] * PROMPT + ids[PROMPT:]) for ids in rows) / count).backward()
    for path, error in uncertain.items():
        truth, moved = truths[path], values[peft_name(path)].grad
        spread = (torch.linalg.vector_norm(moved - truth) / torch.linalg.vector_norm(truth)).item()
        assert error < 2 * min(CLOSE, spread), f"{path}: {error:.1e}, theirs moves by {spread:.1e}"
    return ours.fusion


def max_of(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.abs().max()


def peft_name(path: str) -> str:
    """Name in a PeftModel of `path.lora_A` or `path.lora_B`."""
    return f"base_model.model.{path}.default.weight"
