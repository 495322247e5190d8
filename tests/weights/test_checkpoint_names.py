"""Tensors under the names that transformers takes: renamed, beside the model's, heads that are and are not tied."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support import plain, tiny
from tests.support.as_peft import assert_trains_as_peft
from tests.support.built import built
from tests.support.checkpoint_forms import (
    EMBEDDING,
    HEAD,
    OPTIONS,
    TIED,
    assert_reads_what_transformers_reads,
    llama,
    refused,
    rewrite,
)
from tests.support.runs import run_alone, run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def head_alone(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def old_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("norm.weight", "norm.gamma"): t for name, t in tensors.items()}


@pytest.mark.parametrize(("change", "tied"), [(without_prefix, True), (without_prefix, False), (head_alone, True)])
def test_names_are_taken_as_transformers_takes_them(change, tied, tmp_path):
    rewrite(llama(tmp_path, tie_word_embeddings=tied), change)
    assert_reads_what_transformers_reads(tmp_path)


@pytest.mark.parametrize(("family", "old"), [("GPTNeoX", "embed_out."), ("Exaone", "transformer.h.0.attn.")])
def test_families_that_transformers_renames_are_read(family, old, tmp_path):
    tiny.save_model(getattr(transformers, f"{family}Config")(**tiny.SHAPE), tmp_path)
    assert any(name.startswith(old) for name in load_file(tmp_path / "model.safetensors")), "saved under the new names"
    assert_reads_what_transformers_reads(tmp_path)


def test_an_embedding_that_is_only_there_as_the_head_is_missing_where_the_two_are_not_tied(tmp_path, capsys):
    rewrite(llama(tmp_path / "model"), lambda tensors: tensors.pop(EMBEDDING))
    assert f"missing: {EMBEDDING}" in refused(tmp_path / "model", capsys)


BUFFERS = {
    "Apertus": ({}, "mlp.act_fn.beta"),
    "Gemma4Text": ({"head_dim": 16, "hidden_size_per_layer_input": 0} | TIED, "layer_scalar"),
}


@pytest.mark.parametrize("family", BUFFERS)
def test_persistent_buffers_are_read(family, tmp_path):
    more, buffer = BUFFERS[family]
    tiny.save_model(getattr(transformers, f"{family}Config")(**tiny.SHAPE | more), tmp_path)
    before = load_file(tmp_path / "model.safetensors")[f"model.layers.1.{buffer}"]
    rewrite(tmp_path, lambda tensors: tensors[f"model.layers.1.{buffer}"].fill_(0.375))
    assert before.item() != 0.375
    assert_reads_what_transformers_reads(tmp_path)
    assert_trains_as_peft(tmp_path, "lora")


def test_a_buffer_that_is_not_in_the_checkpoint_is_missing(tmp_path, capsys):
    """transformers leaves it as its memory happens to be."""
    tiny.save_model(transformers.ApertusConfig(**tiny.SHAPE), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("act_fn.beta")})
    assert "missing: model.layers.0.mlp.act_fn.beta" in refused(tmp_path / "model", capsys)


EXTRA = {
    "a value head": {"v_head.summary.weight": torch.ones(1, 64)},
    "a layer for several tokens": {
        "model.mtp_layers.0.up_proj.weight": torch.ones(8, 8),
        "mtp.norm.weight": torch.ones(8),
    },
    "a layer beyond the last": {"model.layers.3.self_attn.q_proj.weight": torch.ones(64, 64)},
    "masks": {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)},
}


@pytest.mark.parametrize("kind", EXTRA)
def test_tensors_that_transformers_ignores_are_named_once_and_not_read(kind, tmp_path, capsys):
    rewrite(llama(tmp_path), lambda tensors: tensors.update(EXTRA[kind]))
    assert_reads_what_transformers_reads(tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "not read, as by transformers" in line]
    assert len(said) == 1
    assert all(name in said[0] for name in EXTRA[kind])


def test_rotary_tables_of_old_checkpoints_are_not_worth_a_word(tmp_path, capsys):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(llama(tmp_path), lambda tensors: tensors.update(table))
    assert_reads_what_transformers_reads(tmp_path)
    assert "not read" not in capsys.readouterr().out


def test_a_bias_that_the_config_denies_is_refused(tmp_path, capsys):
    bias = "model.layers.0.self_attn.q_proj.bias"
    rewrite(llama(tmp_path / "model"), lambda tensors: tensors.update({bias: torch.ones(64)}))
    assert f"{bias}, of which its config.json knows nothing" in refused(tmp_path / "model", capsys)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("differs", [True, False])
def test_a_tied_head_that_is_there_as_well_is_compared(differs, prefix, tmp_path, capsys):
    def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = tensors[EMBEDDING] + (1e-3 if differs else 0)
        return {n.replace("model.", prefix): t for n, t in tensors.items()} | {HEAD: head}

    rewrite(llama(tmp_path, **TIED), add)
    assert_reads_what_transformers_reads(tmp_path)
    said = capsys.readouterr().out.count("has a head of its own though its config ties it")
    with built(OPTIONS | {"model_name": tmp_path}) as ours:
        assert ours.model.is_tied() == (not differs)
    assert said == differs
    assert_trains_as_peft(tmp_path, "lora")


def test_a_head_of_another_shape_is_refused(tmp_path, capsys):
    rewrite(llama(tmp_path / "model", **TIED), lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:260].clone()}))
    assert f"{HEAD} is [260, 64] and should be [264, 64]" in refused(tmp_path / "model", capsys)


def test_a_head_in_4_bits_is_decoded(tmp_path, capsys):
    llama(tmp_path / "model")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["nothing"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, device_map=str(plain.DEVICE), quantization_config=settings
    )
    theirs.save_pretrained(tmp_path / "4bit")
    assert f"{HEAD}.absmax" in load_file(tmp_path / "4bit/model.safetensors")
    tiny.save_tokenizer(tmp_path / "4bit")
    with built(OPTIONS | {"model_name": tmp_path / "4bit", "train_type": "qlora"}) as ours:
        head = ours.model.head.weight.decode(torch.float32).cpu()
    truth = plain.decoded(theirs.lm_head).view_as(head).float().cpu()
    torch.testing.assert_close(head, truth, rtol=0, atol=1e-6)
    assert not torch.equal(head, load_file(tmp_path / "model/model.safetensors")[HEAD])
    line = refused(tmp_path / "4bit", capsys, "double_quant", train_type="qlora", double_quant=False)
    assert "double_quant: false is not what the checkpoint has" in line


def test_two_ranks_agree_on_the_head_and_train_as_one(tmp_path):
    """Rank 0 alone compares it with the embedding."""
    rewrite(llama(tmp_path / "model", **TIED), lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 0.01}))
    options = OPTIONS | {"model_name": tmp_path / "model", "dataset_samples": 8, "max_steps": 2, "lr": 1e-2}
    two = run_ranks({"two": options | {"batch_size": 2}}, 2, tmp_path)["two"]
    one = run_alone(options | {"batch_size": 4}, tmp_path / "one")
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    said = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(said.lm_head.weight, said.model.embed_tokens.weight)
