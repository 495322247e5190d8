"""The adapters of a block, which lie in one tensor with those of the blocks that are updated with it."""

import torch
from transformers import LlamaConfig

from tests.support import tiny
from tests.support.built import built


def test_values_that_arrive_late_leave_valid_what_a_block_before_has_saved(tmp_path):
    """Without checkpointing autograd saves adapters themselves and compares their versions in backward."""
    tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path)
    options = {"model_name": tmp_path, "dataset": "dummy", "precision": "fp32", "lora_rank": 4, "context_length": 16}
    with built(options | {"fused": "false", "use_gradient_checkpointing": False}) as ours:
        blocks = list(ours.model.blocks.values())
        for block, group in zip(blocks[1:], ours.adapters.groups[1:], strict=True):
            block.before_forward.append(lambda group=group: group.working.add_(0.01))
        ids = torch.arange(16).view(1, 16)
        gradients = ours.backward(ours.loss(ids, ids, 15.0))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
