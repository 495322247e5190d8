"""Checkpoints in HQQ that are damaged, or that this run's numbers cannot hold: one line each, whoever saved them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.support import tiny
from tests.support.checkpoint_forms import refused, rewrite
from tests.support.tiers import some_slow
from tests.weights.test_hqq_checkpoints import ALIKE, OPTIONS, SHAPE, hqq_pickle, hqq_safetensors, quantized
from tests.weights.test_hqq_checkpoints import transformers_4 as told

pytestmark = pytest.mark.usefixtures("one_thread_throughout")

LINEAR = "model.layers.1.mlp.up_proj"
ANEW = OPTIONS | {"overwrite_output_dir": True}


Save = Callable[..., None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread_throughout) -> dict[Save, Path]:
    """A model in HQQ as each program saves it."""
    folder = tmp_path_factory.mktemp("whole")
    base = quantized(tiny.save_model(LlamaConfig(**SHAPE), folder / "model"), ALIKE)
    for save in (told, hqq_safetensors, hqq_pickle):
        save(base, folder / save.__name__, ALIKE)
        tiny.save_tokenizer(folder / save.__name__)
    return {save: folder / save.__name__ for save in (told, hqq_safetensors, hqq_pickle)}


@pytest.fixture
def saved(whole, tmp_path) -> Callable[[Save], Path]:
    """A copy of what a program saves, to be damaged."""
    return lambda save: shutil.copytree(whole[save], tmp_path / "hqq")


@pytest.mark.parametrize("save", some_slow([told, hqq_safetensors], 2), ids=["told", "untold"])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("packing", lambda t: t.float(), "the file is damaged"),
        ("packing", lambda t: t[:0], "3 bits packed as ; "),
        ("packing", lambda t: t.to(torch.int64) + 1_000_000_000, "the file is damaged"),
        ("shape", lambda t: torch.tensor(7), "the file is damaged"),
        ("shape", lambda t: t.float() * torch.nan, "the file is damaged"),
        ("shape", lambda t: t.flip(0), "belongs there"),
        ("nbits", lambda t: t.to(torch.complex64), "is no single number: the file is damaged"),
        ("group_size", lambda t: torch.tensor(torch.nan), "has groups of nan"),
        ("scale", lambda t: t.index_fill(0, torch.tensor([3]), torch.nan), "scale in the checkpoint holds NaN"),
        ("zero", lambda t: t.index_fill(0, torch.tensor([3]), torch.inf), "zero in the checkpoint holds NaN"),
        ("scale", lambda t: (t * torch.nan).to(torch.float8_e4m3fn), "scale in the checkpoint holds NaN"),
        ("W_q", lambda t: t[1:], "W_q is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_tensor_is_one_line(save, name, change, words, saved, capsys):
    folder = saved(save)
    rewrite(folder, lambda tensors: tensors.update({f"{LINEAR}.{name}": change(tensors[f"{LINEAR}.{name}"])}))
    line = refused(folder, capsys, "train.py", **ANEW)
    assert words in line
    assert LINEAR in line


@pytest.mark.parametrize(
    "quant_config",
    [
        {"self_attn.q_proj": [3, 64]},
        {"weight_quant_params": 3},
        {"weight_quant_params": {"nbits": [3], "group_size": 64, "axis": 1}},
        {"weight_quant_params": {"nbits": 3.5, "group_size": 64, "axis": 1}},
        {"weight_quant_params": {"nbits": 3, "group_size": True, "axis": 1}},
        {"weight_quant_params": {"nbits": 3, "group_size": None, "axis": 1}},
    ],
    ids=str,
)
def test_a_config_that_does_not_say_the_form_is_one_line(quant_config, saved, capsys):
    folder = saved(told)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_config"] = quant_config
    (folder / "config.json").write_text(json.dumps(config))
    assert "in another form than" in refused(folder, capsys, **ANEW)


@pytest.mark.parametrize("value", ["3bit_\u4e09", "\ud800", 2**70, None], ids=ascii)
def test_a_setting_that_hqq_does_not_write_is_one_line(value, saved, capsys):
    folder = saved(hqq_pickle)
    modules = torch.load(folder / "qmodel.pt", weights_only=True)
    modules[LINEAR]["packing"] = value
    torch.save(modules, folder / "qmodel.pt")
    line = refused(folder, capsys, "train.py", **ANEW)
    assert f"{LINEAR}.weight in the checkpoint has 3 bits packed as" in line or "packing is missing" in line


def test_scales_that_float16_cannot_hold_are_one_line(saved, capsys):
    folder = saved(told)
    rewrite(folder, lambda tensors: tensors[f"{LINEAR}.zero"].fill_(70_000))
    line = refused(folder, capsys, "train.py", **ANEW | {"precision": "fp16_autocast"})
    assert f"precision: {LINEAR}.zero in the checkpoint has numbers beyond the largest of torch.float16, 65504" in line
