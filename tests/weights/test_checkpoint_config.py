"""What config and tokenizer of a checkpoint say: scaled positions, families that are refused, pad tokens outside."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import train
from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.models.skeleton import max_positions, quantization_of, read_config
from fsdp_qlora.weights.codecs import choose_codec
from tests.support import tiny
from tests.support.as_peft import assert_trains_as_peft
from tests.support.checkpoint_forms import (
    OPTIONS,
    TIED,
    llama,
    refused,
    rewrite,
)
from tests.support.runs import flags
from tests.support.tiers import some_slow

pytestmark = pytest.mark.usefixtures("one_thread")


SCALED = {
    "none": ({}, 256),
    "yarn that states the original": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        1024,
    ),
    "yarn that states the scaled": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "yarn without an original": ({"rope_type": "yarn", "factor": 2.5}, 640),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 512),
    "linear": ({"rope_type": "linear", "factor": 3.0}, 768),
    "old names": ({"type": "linear", "factor": 3.0}, 768),
}


@pytest.mark.parametrize("kind", SCALED)
def test_contexts_up_to_the_scaled_length_are_accepted(kind, tmp_path):
    scaling, longest = SCALED[kind]
    llama(tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_scaling": scaling, "rope_theta": rope["rope_theta"]} if scaling else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert max_positions(read_config(str(tmp_path), None)) == longest


def test_a_context_beyond_the_stated_length_trains_where_positions_are_scaled(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    llama(tmp_path / "model", max_position_embeddings=64, rope_parameters=yarn)
    options = {"model_name": tmp_path / "model", "output_dir": tmp_path / "out", "dataset_samples": 2, "max_steps": 1}
    assert train.main(flags(OPTIONS | options | {"context_length": 256})) == 0


def test_positions_of_each_kind_of_layer_are_looked_at(tmp_path):
    kinds = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    config = transformers.Gemma3TextConfig(**tiny.SHAPE | {"rope_parameters": kinds})
    assert max_positions(config) == 8 * 256


NOT_CAUSAL = {
    "Bert": ({}, "its attention looks both ways"),
    "Llama": ({"is_causal": False}, "its attention looks both ways"),
    "Gemma": ({"use_bidirectional_attention": True}, "its attention looks both ways"),
    "Gemma3Text": ({"use_bidirectional_attention": True}, "its attention looks both ways"),
    "Gemma4Text": ({"use_bidirectional_attention": "all"}, "its attention looks both ways"),
    "BertGeneration": ({"is_decoder": True, "add_cross_attention": True}, "its layers look at an encoder"),
    "TrOCR": ({}, "its layers look at an encoder"),
    "Git": ({}, "it changes what its embedding gave in place"),
    "CpmAnt": ({}, "its attention looks at later tokens too"),
    "PaliGemma": (None, "it wraps a text model"),
}


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_what_cannot_be_trained_is_named_before_anything_is_read(family, tmp_path, capsys):
    more, why = NOT_CAUSAL[family]
    config = getattr(transformers, f"{family}Config")(**({} if more is None else tiny.SHAPE | more))
    config.save_pretrained(tmp_path / "model")
    line = refused(tmp_path / "model", capsys)
    assert why in line
    assert f"is a {config.model_type} model" in line


@pytest.mark.parametrize("planned_for", [{}, {"plan_only": True, "plan_for": "2x4090"}])
def test_layers_that_are_left_out_at_random_are_refused(planned_for, tmp_path, capsys):
    transformers.OPTConfig(**tiny.SHAPE | {"ffn_dim": 96, "layerdrop": 0.1}).save_pretrained(tmp_path / "model")
    assert "(layerdrop 0.1 in the model's config.json)" in refused(
        tmp_path / "model", capsys, dummy_weights=True, **planned_for
    )


@pytest.mark.parametrize("shared", [8, 3])
@pytest.mark.parametrize("family", ["Exaone", "Phi3"])
def test_heads_that_do_not_divide_are_refused(family, shared, tmp_path, capsys):
    """EXAONE's config has 8 key/value heads where nothing else is said; Phi-3 has queries and keys in one linear."""
    config = getattr(transformers, f"{family}Config")(**tiny.SHAPE)
    config.num_key_value_heads = shared
    config.save_pretrained(tmp_path / "model")
    line = refused(tmp_path / "model", capsys, dummy_weights=True)
    assert f"4 attention heads and {shared} key/value heads" in line


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 10000.0}, "spiral"),
        ("hidden_act", "relu_to_come", "relu_to_come"),
        ("head_dim", -16, "negative dimension"),
        ("num_hidden_layers", 0, "no list of 0 decoder layers"),
    ],
)
def test_a_value_that_transformers_cannot_build_is_one_line(field, value, why, tmp_path, capsys):
    transformers.LlamaConfig(**tiny.SHAPE).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert why in refused(tmp_path / "model", capsys, dummy_weights=True)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_in_which_a_token_does_not_see_itself_is_refused(window, tmp_path, capsys):
    transformers.MistralConfig(**tiny.SHAPE | {"sliding_window": window}).save_pretrained(tmp_path / "model")
    assert f"sliding_window of {window}" in refused(tmp_path / "model", capsys, dummy_weights=True)


@pytest.mark.parametrize(
    ("family", "kinds", "said"),
    [
        ("Gemma2", ["full_attention", "chunked_attention"], "chunked_attention, which a gemma2 model does not have"),
        ("Qwen2", ["linear_attention", "full_attention"], "linear_attention, which a qwen2 model does not have"),
        ("Cohere2", ["full_attention", "chunked_attention"], "chunked_attention, which a cohere2 model does not have"),
        ("Qwen3", ["full_attention", "windowed"], "The `layer_types` entries must be in ('full_attention', "),
        ("Llama", ["full_attention"], "`num_hidden_layers` (2) must be equal to the number of `layer_types` (1)"),
    ],
)
def test_layers_of_a_kind_that_a_family_lacks_are_one_line_before_anything_is_read(
    family: str, kinds: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model" / "config.json"
    getattr(transformers, f"{family}Config")(**tiny.SHAPE | {"num_hidden_layers": 2}).save_pretrained(file.parent)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_types": kinds}))
    assert said in refused(file.parent, capsys, dummy_weights=True)


def test_a_family_that_does_not_read_the_kinds_of_its_layers_trains_whatever_they_are(tmp_path: Path) -> None:
    """As transformers has it."""
    kinds = ["linear_attention", "full_attention"]
    llama(tmp_path / "model", num_hidden_layers=2, layer_types=kinds)
    options = {"model_name": tmp_path / "model", "output_dir": tmp_path / "out", "dataset_samples": 2, "max_steps": 1}
    assert train.main(flags(OPTIONS | options)) == 0


def test_norms_may_add_nothing_to_the_mean_square(tmp_path):
    assert_trains_as_peft(llama(tmp_path, rms_norm_eps=0.0, pad_token_id=None), "lora")


def test_two_dimensional_norms_are_read(tmp_path):
    config = transformers.CohereConfig(**tiny.SHAPE | TIED | {"use_qk_norm": True})
    tiny.save_model(config, tmp_path)
    rewrite(tmp_path, lambda tensors: [t.add_(torch.randn_like(t)) for n, t in tensors.items() if "_norm" in n])
    assert load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.q_norm.weight"].ndim == 2
    assert_trains_as_peft(tmp_path, "lora")


@pytest.mark.parametrize("pad", some_slow(["added", "none"], 2))
def test_a_pad_token_outside_the_embedding_changes_nothing(pad, tmp_path):
    """Padding is masked by its position: a run with any id there learns the same."""
    folder = llama(tmp_path / "model", vocab_size=259)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = tiny.save_rows(tmp_path / "rows.jsonl", 6)
    options = OPTIONS | {"dataset": rows, "batch_size": 3, "lr": 1e-2, "save_model": False}
    assert train.main(flags(options | {"model_name": folder, "output_dir": tmp_path / "before"})) == 0
    if pad == "added":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == 259
    else:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert train.main(flags(options | {"model_name": folder, "output_dir": tmp_path / "after"})) == 0
    before, after = ((tmp_path / run / "metrics.jsonl").read_text() for run in ("before", "after"))
    losses = re.compile(r'"loss": [0-9.e-]+')
    assert losses.findall(before) == losses.findall(after) != []


@pytest.mark.parametrize(
    ("method", "train_type", "told"),
    [
        ({"quant_method": "fp8"}, "lora", "use the unquantized model"),
        ({"quant_method": "fp8"}, "qlora", "use the unquantized model"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "lora", "use the unquantized model"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "lora",
            "use --train_type qlora",
        ),
    ],
    ids=["fp8, lora", "fp8, qlora", "8 bits, lora", "nf4, lora"],
)
def test_a_hint_for_a_quantized_checkpoint_leads_to_what_works(method, train_type, told) -> None:
    config = transformers.LlamaConfig(**tiny.SHAPE, quantization_config=method)
    with pytest.raises(UserError, match=told):
        choose_codec(ModelOptions("none", train_type=train_type), quantization_of(config), torch.float32)
