"""Adapters' first values: PEFT's, the same however many ranks and threads draw them, and whenever."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from fsdp_qlora.adapters.lora import linear_seed
from fsdp_qlora.config.parse import parse
from fsdp_qlora.kernels.masters import join, split_
from fsdp_qlora.optim import adapter_values
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from tests.support import tiny
from tests.support.built import built
from tests.support.first_values import first_values
from tests.support.runs import flags

OPTIONS = {"dataset": "dummy", "lora_rank": 3, "fused": "false", "train_type": "lora"}


def test_they_are_drawn_as_peft_draws_them():
    values = first_values("model.layers.3.mlp.up_proj", 40, 24, 8, seed=7)
    like = torch.empty(8, 24)
    nn.init.kaiming_uniform_(
        like, a=math.sqrt(5), generator=torch.Generator().manual_seed(linear_seed(7, "model.layers.3.mlp.up_proj"))
    )
    assert torch.equal(values["lora_A"], like)
    assert values["lora_B"].shape == (40, 8)
    assert not values["lora_B"].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_ranks_and_threads_change_none(monkeypatch, tmp_path, precision, threads):
    monkeypatch.setattr(adapter_values, "DRAWING_THREADS", threads)
    monkeypatch.setattr(adapter_values, "usable_cores", lambda physical: 5 * threads)
    options = OPTIONS | {"model_name": tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path), "precision": precision}
    with built(options) as ours:
        config = parse(flags(options))
        for rank in (0, 3):
            adapters = ShardedAdapters(
                ours.model, replace(ours.world, rank=rank, size=5), config, accumulates=False, draw=False
            )
            assert not any(group.working.any() for group in adapters.groups)
            adapters.draw()
            linears = ours.model.linears()
            for group in adapters.groups:
                flat = []
                for name, parameter in zip(group.names, group.params, strict=True):
                    path, _, matrix = name.rpartition(".")
                    linear = linears[path]
                    values = first_values(path, linear.out_features, linear.in_features, 3, config.training.seed)
                    assert torch.equal(parameter.detach().cpu(), values[matrix].to(parameter.dtype))
                    flat.append(values[matrix].flatten())
                whole = torch.cat([*flat, torch.zeros(group.working.numel() - sum(map(len, flat)))])
                mine = whole.view(5, -1)[rank]
                assert mine.any()
                if precision == "bf16":  # a master copy is 16 bits beside a working value, which a tie makes inexact
                    high, low = torch.zeros(1, len(mine), dtype=torch.bfloat16), torch.zeros(1, len(mine)).short()
                    split_(mine[None], high, low)
                    mine = join(high, low)[0]
                assert torch.equal(group.masters.values(group.index).cpu(), mine)
