"""One comparison for every model: loss and adapter gradients of ours against the same model under transformers + PEFT.

Two rows of unequal length in one padded batch on our side, one after the other and unpadded on theirs; float32."""

from pathlib import Path

import pytest
import torch

from fsdp_qlora.models.fused.fuse import Fusion
from tests.support import plain
from tests.support.built import built
from tests.support.runs import Options

CLOSE = 3e-5  # relative error of the loss and of each gradient as a whole
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
    for path, gradient in gradients.items():
        truth = values[peft_name(path)].grad
        assert truth.abs().max() > 0, f"{path}: nothing to compare"
        for measure, allowed in ((torch.linalg.vector_norm, CLOSE), (max_of, FURTHEST)):
            error, size = measure(gradient - truth).item(), measure(truth).item()
            assert error < allowed * size, f"{path}: {error:.1e} of {size:.1e}"
    return ours.fusion


def max_of(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.abs().max()


def peft_name(path: str) -> str:
    """Name in a PeftModel of `path.lora_A` or `path.lora_B`."""
    return f"base_model.model.{path}.default.weight"
