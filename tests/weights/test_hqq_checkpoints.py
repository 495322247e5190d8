"""Checkpoints in HQQ as they come: saved by transformers 4 with an HqqConfig, by hqq into safetensors or qmodel.pt.

transformers 5 no longer saves any; 4.57 saves what `transformers_4` below writes (tried)."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hqq.core.quantize import HQQLinear, hqq_base_quant_config
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import train
from fsdp_qlora.__main__ import main
from fsdp_qlora.models.fitting import fit
from fsdp_qlora.models.precision import MODES
from fsdp_qlora.models.skeleton import build, read_config
from fsdp_qlora.weights import checkpoint_files
from fsdp_qlora.weights.checkpoint import Checkpoint
from fsdp_qlora.weights.choose import told_forms
from fsdp_qlora.weights.frozen_bytes import decode_rows
from tests.support import tiny
from tests.support.built import built
from tests.support.checkpoint_forms import refused, rewrite
from tests.support.plain import Recipe, as_hqq
from tests.support.runs import flags, run_alone, run_ranks
from tests.support.truth import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = tiny.SHAPE | {"intermediate_size": 192, "num_hidden_layers": 2}
OPTIONS = {"dataset": "dummy", "train_type": "hqq_lora", "precision": "fp32", "lora_rank": 2}
ALIKE = hqq_base_quant_config(3, 64, axis=1)
MIXED = {
    **{f"self_attn.{name}_proj": hqq_base_quant_config(4, 32, axis=1) for name in "qko"},
    "self_attn.v_proj": hqq_base_quant_config(8, 16, axis=0),
    "mlp.up_proj": hqq_base_quant_config(2, 64, axis=0, view_as_float=True),
    "mlp.down_proj": hqq_base_quant_config(1, 64, axis=1),
}  # gate_proj stays as it is
FORMS = {"alike": ALIKE, "mixed": MIXED}


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """hqq collects garbage after each linear: let it not look at what earlier tests have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_model(LlamaConfig(**SHAPE), tmp_path_factory.mktemp("model"))


def quantized(model: Path, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as hqq quantizes it, on the device that our runs quantize on."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    AutoHQQHFModel.quantize_model(base, json.loads(json.dumps(settings)), compute_dtype=dtype, device=str(DEVICE))
    return base


def transformers_4(base: PreTrainedModel, folder: Path, settings: dict[str, Any]) -> None:
    config = base.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_config": settings, "quant_method": "hqq", "skip_modules": ["lm_head"]},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.cpu().clone() for name, tensor in base.state_dict().items()}, folder / "model.safetensors")


def hqq_safetensors(base: PreTrainedModel, folder: Path, settings: dict[str, Any]) -> None:
    AutoHQQHFModel.save_to_safetensors(base, str(folder), verbose=False)


def hqq_pickle(base: PreTrainedModel, folder: Path, settings: dict[str, Any]) -> None:
    AutoHQQHFModel.save_quantized(base, str(folder))


def hqq_pickle_of_old(base: PreTrainedModel, folder: Path, settings: dict[str, Any]) -> None:
    """As hqq 0.1 wrote it: the settings in a table of their own."""
    hqq_pickle(base, folder, settings)
    modules = torch.load(folder / "qmodel.pt", weights_only=True)
    for name, state in modules.items():
        if "W_q" in state:
            modules[name] = {"W_q": state.pop("W_q"), "bias": None, "meta": state}
    torch.save(modules, folder / "qmodel.pt")


SAVED = {save.__name__: save for save in (transformers_4, hqq_safetensors, hqq_pickle, hqq_pickle_of_old)}


def decoded(base: PreTrainedModel) -> dict[str, Tensor]:
    return {
        name: module.dequantize() if isinstance(module, HQQLinear) else module.weight.data
        for name, module in base.named_modules()
        if name.endswith("_proj")
    }


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saved_by", SAVED)
def test_a_checkpoint_in_hqq_is_taken_over_bit_for_bit(saved_by, form, dtype, model, tmp_path):
    base = quantized(model, FORMS[form], dtype)
    SAVED[saved_by](base, tmp_path / "hqq", FORMS[form])
    tiny.save_tokenizer(tmp_path / "hqq")
    truth = decoded(base)
    for module in base.modules():  # scales that were stored in float16 are widened to compute in float32, as by hqq
        if isinstance(module, HQQLinear):
            module.compute_dtype = torch.float32
            module.cuda(str(DEVICE))
    again = decoded(base)
    with built(OPTIONS | {"model_name": tmp_path / "hqq"}) as ours:
        linears = ours.model.linears()
        assert linears.keys() == truth.keys()
        for name, linear in linears.items():
            assert torch.equal(linear.weight.decode(torch.float32).cpu(), again[name].float().cpu()), name
        names = {linear.weight.home.layout.entries[linear.weight.name].codec.name for linear in linears.values()}
        assert len(names) == (1 if form == "alike" else 5)


@pytest.mark.parametrize("saved_by", ["transformers_4", "hqq_pickle"])
def test_a_checkpoint_in_hqq_trains_as_the_one_it_was_made_from(saved_by, model, tmp_path):
    SAVED[saved_by](quantized(model, ALIKE), tmp_path / "hqq", ALIKE)
    tiny.save_tokenizer(tmp_path / "hqq")
    options = OPTIONS | {"dataset_samples": 8, "context_length": 32, "batch_size": 2, "lr": 1e-2}
    ready = run_alone(options | {"model_name": tmp_path / "hqq"}, tmp_path / "ready")
    fresh = run_alone(options | {"model_name": model, "n_bits": 3}, tmp_path / "fresh")
    assert len(fresh.losses) == 4
    assert ready.losses == fresh.losses


@pytest.fixture(scope="module")
def ready(model, tmp_path_factory) -> dict[str, Path]:
    """The same model in HQQ, with a config.json that says so and without."""
    base, folder = quantized(model, ALIKE), tmp_path_factory.mktemp("ready")
    transformers_4(base, folder / "told", ALIKE)
    hqq_safetensors(base, folder / "untold", ALIKE)
    for name in ("told", "untold"):
        tiny.save_tokenizer(folder / name)
    return {name: folder / name for name in ("told", "untold")}


@pytest.mark.parametrize("how", ["told", "untold"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_type": "qlora"}, ["train_type: qlora does not train over", "use --train_type hqq_lora"]),
        ({"train_type": "lora"}, ["train_type: lora does not train over", "use --train_type hqq_lora"]),
        ({"n_bits": 4}, ["n_bits: 4 is not what the checkpoint has (3 in ", "omit n_bits"]),  # the usual, but asked for
        ({"n_bits": 2}, ["n_bits: 2 is not what the checkpoint has (3 in ", "omit n_bits"]),
        ({"hqq_group_size": 32}, ["hqq_group_size: 32 is not what the checkpoint has (64 in ", "omit hqq_group_size"]),
        ({"hqq_axis": 0}, ["hqq_axis: 0 is not what the checkpoint has (1 in ", "omit hqq_axis"]),
        ({"hqq_optimize": False}, ["hqq_optimize: false has no effect", "omit hqq_optimize"]),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_checkpoint_are_refused(options, words, how, ready, tmp_path, capsys):
    line = refused(ready[how], capsys, "hqq" if "qlora" in str(options) else "", **OPTIONS | options)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("options", "has"),
    [
        ({"hqq_group_size": 64}, "hqq_group_size: 64 is not what the checkpoint has (32 in "),
        ({"hqq_axis": 1}, "hqq_axis: 1 is not what the checkpoint has (0 in "),
    ],
    ids=str,
)
def test_usual_values_that_are_asked_for_are_compared_too(options, has, model, tmp_path, capsys):
    form = hqq_base_quant_config(3, 32, axis=0)
    transformers_4(quantized(model, form), tmp_path / "hqq", form)
    tiny.save_tokenizer(tmp_path / "hqq")
    assert has in refused(tmp_path / "hqq", capsys, "hqq_", **OPTIONS | options)


def test_a_run_over_a_published_base_repeats_from_its_config_and_merges(ready, tmp_path, capsys):
    """config.yaml has all options, also those that the checkpoint decided."""
    options = OPTIONS | {"model_name": ready["untold"], "dataset_samples": 4, "context_length": 32, "batch_size": 2}
    first = run_alone(options, tmp_path / "first")
    again = run_alone({"config": first.folder / "config.yaml"}, tmp_path / "again")
    assert again.losses == first.losses
    assert main(["merge", "--adapter", str(first.folder), "--output_dir", str(tmp_path / "merged")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.vocab_size == SHAPE["vocab_size"]


def test_a_checkpoint_goes_on_where_the_bits_are_named_or_left_open(ready, tmp_path, capsys):
    options = OPTIONS | {"model_name": ready["told"], "dataset_samples": 8, "context_length": 32, "batch_size": 2}
    run_alone(options | {"save_steps": 2, "max_steps": 2}, tmp_path / "out")
    longer = options | {"resume": "auto", "save_steps": 2, "max_steps": 4}
    assert len(run_alone(longer | {"n_bits": 3, "hqq_group_size": 64}, tmp_path / "out").losses) == 4


def test_what_tells_the_forms_is_read_at_once(ready, monkeypatch):
    """A file is opened once for each thread, whatever the number of its tensors: all of its header is parsed then."""
    opened, safe_open = [], checkpoint_files.safe_open
    monkeypatch.setattr(checkpoint_files, "safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k))
    skeleton = build(read_config(str(ready["untold"]), None), MODES["fp32"], "eager")
    weights = fit(skeleton, Checkpoint(ready["untold"], workers=2))
    forms = told_forms(None, weights, torch.float32)
    assert len(forms) == 14
    assert {codec.form for _, codec in forms.values()} == {(3, 64, 1)}
    assert len(opened) <= 1 + 2  # for the names, and in each thread


def test_options_that_the_checkpoint_has_too_are_no_mistake(ready):
    with built(OPTIONS | {"model_name": ready["told"], "n_bits": 3, "hqq_axis": 1, "hqq_optimize": True}) as ours:
        assert len(ours.model.linears()) == 14


def test_a_damaged_or_foreign_checkpoint_is_one_line(model, tmp_path, capsys):
    base, anew = quantized(model, ALIKE), OPTIONS | {"overwrite_output_dir": True}
    transformers_4(base, tmp_path / "lacks", ALIKE)
    tiny.save_tokenizer(tmp_path / "lacks")
    rewrite(tmp_path / "lacks", lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("up_proj.zero")})
    assert "up_proj.zero is missing from the checkpoint" in refused(tmp_path / "lacks", capsys, "train.py", **anew)

    transformers_4(base, tmp_path / "other", hqq_base_quant_config(4, 64, axis=1))
    tiny.save_tokenizer(tmp_path / "other")
    assert "in 3 bits in groups of 64 along axis 1; " in refused(tmp_path / "other", capsys, "train.py", **anew)

    settings = {"weight_quant_params": {"nbits": 5, "group_size": 64, "axis": 1}}
    transformers_4(base, tmp_path / "five", settings)
    assert "in another form than" in refused(tmp_path / "five", capsys, **anew)

    hqq_pickle(base, tmp_path / "pickle", ALIKE)
    torch.save([1], tmp_path / "pickle" / "qmodel.pt")
    assert "is no table of modules as hqq saves it" in refused(tmp_path / "pickle", capsys, **anew)


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ({}, {}, "64 along axis 1 does not fit a linear of [64, 144]: its 144 inputs are no multiple of 64; use "
         "--train_type qlora"),
        ({}, {"train_type": "hqq_dora"}, "64 along axis 1 does not fit a linear of [64, 144]: its 144 inputs are no "
         "multiple of 64; use --train_type bnb_dora"),
        ({"hidden_size": 128, "intermediate_size": 192, "head_dim": 24}, {"hqq_group_size": 128},
         "128 along axis 1 does not fit a linear of [128, 96]: its 96 inputs are no multiple of 128; set it to 32"),
        ({"hidden_size": 128, "intermediate_size": 192}, {"hqq_group_size": 128, "hqq_axis": 0},
         "128 along axis 0 does not fit a linear of [64, 128]: its 64 outputs are no multiple of 128; set it to 32 or "
         "64"),
        ({"intermediate_size": 144, "hidden_size": 144, "num_attention_heads": 8, "num_key_value_heads": 8,
          "head_dim": 16}, {}, "64 along axis 1 does not fit a linear of [128, 144]: its 144 inputs are no multiple of "
         "64; use --train_type qlora"),
    ],
    ids=["no groups", "dora", "of all linears", "axis 0", "first of all"],
)  # fmt: skip
def test_unfit_groups_are_one_line_before_anything_is_read(shape, options, said, tmp_path, capsys):
    """The groups that it names fit every linear, and the train type trains what was asked for."""
    folder = tiny.save_model(LlamaConfig(**tiny.SHAPE | shape), tmp_path / "model")
    assert refused(folder, capsys, "hqq_group_size", **OPTIONS | options) == f"train.py: hqq_group_size: {said}"


@pytest.mark.parametrize(
    ("precision", "compute"),
    [
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bf16_autocast", torch.bfloat16),
        ("fp16_autocast", torch.float16),
    ],
)
def test_a_run_multiplies_with_hqqs_numbers_in_its_compute_dtype(precision, compute, model):
    """Also several matrices at once, as fused blocks decode them."""
    plainly = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with built(OPTIONS | {"model_name": model, "n_bits": 3, "precision": precision}) as ours:
        linears = ours.model.linears()
        for name, linear in linears.items():
            truth = as_hqq(plainly.get_submodule(name).weight.data, Recipe(hqq=(3, 64, 1)), compute)
            assert torch.equal(linear.weight.decode(compute).cpu(), truth.cpu()), name
        qkv = [linears[f"model.layers.1.self_attn.{name}_proj"].weight for name in "qkv"]
        together = torch.empty(128, 64, dtype=compute, device=ours.world.device)
        decode_rows(qkv, together)
        assert torch.equal(together, torch.cat([weight.decode(compute) for weight in qkv]))


def test_two_ranks_train_alike_whether_the_config_tells_the_forms_or_the_tensors(ready, tmp_path):
    """One rank reads what the tensors tell, for both."""
    options = OPTIONS | {"dataset_samples": 8, "context_length": 32, "batch_size": 2}
    runs = run_ranks({how: options | {"model_name": ready[how]} for how in ready}, 2, tmp_path)
    assert len(runs["told"].losses) == 2
    assert runs["untold"].losses == runs["told"].losses


@pytest.mark.parametrize("how", ["told", "untold"])
def test_a_plan_for_another_rig_counts_the_bits_that_the_checkpoint_has(how, ready, capsys):
    options = OPTIONS | {"model_name": ready[how], "plan_only": True, "plan_for": "1x4090", "context_length": 32}
    assert train.main(flags(options)) == 0
    assert "hqq-3bit-g64-axis1-float32" in capsys.readouterr().out
