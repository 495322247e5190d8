"""An adapter trained over HQQ merges into the base that hqq decodes, from any checkpoint of it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.export.test_merge import SHAPE, logits, merge, tensors_of
from tests.support import plain, tiny
from tests.support.saved_adapters import save_random_adapter
from tests.weights.test_hqq_checkpoints import ALIKE, quantized, transformers_4

pytestmark = pytest.mark.usefixtures("one_thread")
HQQ = {"train_type": "hqq_lora", "n_bits": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(LlamaConfig(**SHAPE), tmp_path_factory.mktemp("llama"), torch.bfloat16)


def with_peft(base: Path, adapter: Path, recipe: plain.Recipe) -> torch.nn.Module:
    """hqq's own weights, which it decodes in bfloat16, and the adapter, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for linear in plain.decoder_linears(model):
        linear.weight.data.copy_(plain.as_hqq(linear.weight.data, recipe, torch.bfloat16))
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.parametrize("axis", [0, 1])
def test_merged_in_float32_is_hqqs_base_plus_adapter(axis, base, tmp_path, capsys):
    more = {"hqq_axis": axis, "hqq_group_size": 32}
    adapter = save_random_adapter(tmp_path / "a", HQQ | more | {"model_name": base})
    merge(capsys, adapter=adapter, output_dir=tmp_path / "m", dtype="fp32", check_rows=0)
    theirs = with_peft(base, adapter, plain.Recipe(hqq=(3, 32, axis)))
    state = theirs.state_dict()
    for name, tensor in tensors_of(tmp_path / "m").items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(tmp_path / "m"), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_base_published_in_hqq_is_merged_as_it_is(base, tmp_path, capsys):
    transformers_4(quantized(base, ALIKE, torch.bfloat16), tmp_path / "hqq", ALIKE)
    tiny.save_tokenizer(tmp_path / "hqq")
    adapter = save_random_adapter(tmp_path / "a", HQQ | {"model_name": tmp_path / "hqq"})
    merge(capsys, adapter=adapter, output_dir=tmp_path / "m", dtype="fp32", check_rows=0)
    state = with_peft(base, adapter, plain.Recipe(hqq=(3, 64, 1))).state_dict()
    ours = tensors_of(tmp_path / "m")
    assert ours.keys() == state.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, state[name].float(), rtol=1e-6, atol=1e-7)
    (adapter / "config.yaml").rename(tmp_path / "config.yaml")  # as an adapter of PEFT: the base tells its form
    merge(
        capsys,
        adapter=adapter,
        output_dir=tmp_path / "p",
        dtype="fp32",
        check_rows=0,
        train_type="hqq_lora",
        precision="bf16",
    )
    for name, tensor in tensors_of(tmp_path / "p").items():
        assert torch.equal(tensor, ours[name]), name
    (tmp_path / "config.yaml").rename(adapter / "config.yaml")
    said = merge(capsys, 2, adapter=adapter, output_dir=tmp_path / "o", merge_base="original")
    assert "is published quantized" in said
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_another_width_does_not_go_on_with_an_unfinished_merge(base, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", HQQ | {"model_name": base})
    asked = {"adapter": adapter, "output_dir": tmp_path / "m", "check_rows": 0}
    merge(capsys, **asked)
    first = tensors_of(tmp_path / "m")
    config = adapter / "config.yaml"
    config.write_text(config.read_text().replace("n_bits: 3", "n_bits: 2"))
    merge(capsys, **asked, overwrite_output_dir=True)
    second = tensors_of(tmp_path / "m")
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert len(changed) == len([name for name in first if "_proj" in name])


def test_without_its_config_the_form_of_a_base_is_not_known(base, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", HQQ | {"model_name": base})
    (adapter / "config.yaml").unlink()
    said = merge(capsys, 2, adapter=adapter, output_dir=tmp_path / "m", train_type="hqq_lora", precision="bf16")
    assert "has no config.yaml, which alone tells bits and groups" in said
    assert "--merge_base original" in said
