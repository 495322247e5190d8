"""A model that is published in HQQ as a GGUF file: what its codes decode to."""

from pathlib import Path

import pytest
import torch
from hqq.core.quantize import HQQLinear
from transformers import AutoModelForCausalLM

from tests.export.test_gguf import convert, save_base, tensors_of
from tests.support.small_tokenizers import gpt2_tokenizer
from tests.support.tiers import some_slow
from tests.weights.test_hqq_checkpoints import ALIKE, MIXED, decoded, hqq_safetensors, quantized, transformers_4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", [ALIKE, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("save", some_slow([transformers_4, hqq_safetensors], 2), ids=["told", "untold"])
def test_a_model_published_in_hqq_is_written_as_what_it_decodes_to(save, form, tmp_path):
    """In float32: the scales are stored in float16, and the file has numbers that bfloat16 would have rounded."""
    wide = save_base(tmp_path / "wide", "Llama", intermediate_size=192, num_hidden_layers=1)
    model = quantized(wide, form, torch.float16)
    save(model, tmp_path / "hqq", form)
    gpt2_tokenizer().save_pretrained(tmp_path / "hqq")
    (found,) = convert(tmp_path / "g", model_name=tmp_path / "hqq", quantization="f32")
    (exact,) = convert(tmp_path / "e", model_name=_decoded(model, wide, tmp_path / "decoded"), quantization="f32")
    ours, truth = tensors_of(found), tensors_of(exact)
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(ours[name], tensor), name
    (unquantized,) = convert(tmp_path / "u", model_name=wide, quantization="f32")
    assert not torch.equal(ours["blk.0.ffn_up.weight"], tensors_of(unquantized)["blk.0.ffn_up.weight"])


def _decoded(model: torch.nn.Module, wide: Path, folder: Path) -> Path:
    """The model with hqq's own float32 numbers in place of its codes."""
    plain = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float16).float()
    for module in model.modules():
        if isinstance(module, HQQLinear):
            module.compute_dtype = torch.float32
            module.cuda(str(module.W_q.device))
    for name, weight in decoded(model).items():
        plain.get_submodule(name).weight.data.copy_(weight.float())
    plain.save_pretrained(folder)
    gpt2_tokenizer().save_pretrained(folder)
    return folder
