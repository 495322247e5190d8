"""DoRA adapters after training: read, merged and asked as PEFT does; llama.cpp has none."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig

from fsdp_qlora.__main__ import main
from fsdp_qlora.adapters.dora import DoRA
from fsdp_qlora.adapters.lora import LoRA
from fsdp_qlora.adapters.table import saved_kind
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.inference import build, read_base
from tests.support import plain, tiny
from tests.support.runs import flags
from tests.support.saved_adapters import save_random_adapter

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path_factory.mktemp("base"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("train_type", "quantized"), [("bnb_dora", True), ("dora", False)])
def test_a_merged_model_gives_the_logits_that_peft_gives(train_type, quantized, base, tmp_path, capsys):
    adapter = save_random_adapter(
        tmp_path / "a", {"model_name": base, "train_type": train_type, "precision": "fp32", "use_rslora": True}
    )
    asked = {"adapter": adapter, "output_dir": tmp_path / "merged", "dtype": "fp32", "check_rows": 0}
    assert main(["merge", *flags(asked)]) == 0
    merged = logits(plain.load_base(tmp_path / "merged", plain.Recipe(quantized=False)))
    below = plain.load_base(base, plain.Recipe(quantized=quantized))
    alone = logits(below)
    wanted = logits(PeftModel.from_pretrained(below, adapter))
    assert (wanted - alone).abs().max() > 0.1, "the adapter changes nothing"
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5)


def test_lora_alone_for_llama_cpp_refuses_it_in_one_line(base, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base, "train_type": "bnb_dora"})
    asked = {"adapter": adapter, "lora_only": True, "output_dir": tmp_path / "gguf"}
    assert main(["gguf", *flags(asked)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is DoRA, which llama.cpp has not" in line
    assert "omit lora_only" in line
    assert not list((tmp_path / "gguf").glob("*.gguf"))


def test_pefts_config_tells_lora_and_dora_apart():
    options = AdapterOptions(lora_rank=4, lora_alpha=9.0, use_rslora=True)
    for kind in (LoRA(), DoRA()):
        settings = json.loads(json.dumps(kind.peft_config(options, "base", None, ["q_proj"])))
        found, read = saved_kind(settings)
        assert type(found) is type(kind)
        assert (read.lora_rank, read.lora_alpha, read.use_rslora) == (4, 9.0, True)
        assert settings["use_dora"] == (type(kind) is DoRA)
    name = DoRA().peft_name("model.layers.0.q_proj", "lora_magnitude_vector")
    assert name == "base_model.model.model.layers.0.q_proj.lora_magnitude_vector"
    assert DoRA().from_peft_name(name) == ("model.layers.0.q_proj", "lora_magnitude_vector")
    assert LoRA().from_peft_name(name) is None


def test_an_adapter_of_another_program_is_asked_with_its_magnitudes(base, tmp_path):
    """Its folder says that it is DoRA; train_type says how the base is stored."""
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base, "train_type": "bnb_dora", "precision": "fp32"})
    (adapter / "config.yaml").unlink()
    from fsdp_qlora.config.parse import parse
    from fsdp_qlora.distributed.world import open_world
    from fsdp_qlora.generation.needs import Workload
    from fsdp_qlora.inference import fit_rows
    from fsdp_qlora.session import choose_compute

    config = parse(flags({"model_name": base, "train_type": "qlora", "precision": "fp32", "dataset": "dummy"}))
    given = {"model_name": str(base), "train_type": "qlora", "precision": "fp32", "double_quant": True}
    with open_world(config.launch, 1) as world:
        read = read_base(str(adapter), config.model, given, config)
        assert read.config.model.train_type == "bnb_dora"
        built = build(read, world, choose_compute(read.config, world))
        loaded = built.load(fit_rows(built, Workload(capacity=64, longest=40, count=1, asked=1)))

        def ours() -> torch.Tensor:
            loaded.model.rest.bind()
            with torch.no_grad():
                hidden = loaded.model.final_norm(loaded.model.backbone(input_ids=IDS, use_cache=False)[0])
                return hidden @ loaded.model.head.weight.decode(hidden.dtype).T

        on = ours()
        loaded.set_adapter(False)
        off = ours()
        loaded.set_adapter(True)
        assert torch.equal(ours(), on), "switched off and on it is the same"
    below = plain.load_base(base, plain.Recipe())
    torch.testing.assert_close(off, logits(below), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on, logits(PeftModel.from_pretrained(below, adapter)), rtol=1e-4, atol=1e-5)
    assert (on - off).abs().max() > 0.1
