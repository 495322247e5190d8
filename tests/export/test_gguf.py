"""GGUF files are what llama.cpp makes and opens: its logits are transformers', its tokens the tokenizer's."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

gguf = pytest.importorskip("gguf")
pytest.importorskip("libggml")
pytest.importorskip("cyllama")

from fsdp_qlora.__main__ import main  # noqa: E402
from fsdp_qlora.export.gguf.vocabulary import read_vocabulary  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.llama_cpp import LlamaCpp, quantized  # noqa: E402
from tests.support.runs import flags  # noqa: E402
from tests.support.saved_adapters import save_random_adapter  # noqa: E402
from tests.support.small_tokenizers import gpt2_tokenizer, llama2_tokenizer, sentencepiece_model  # noqa: E402

SHAPE = tiny.SHAPE | {"vocab_size": 448, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 4}
IDS = [1, *range(40, 79)]
WINDOWS = {"sliding_window": 16}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "Llama": {"rope_parameters": LLAMA3},
    "Mistral": {"sliding_window": None, "head_dim": 24},
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Gemma": GEMMA,
    "Gemma2": GEMMA | WINDOWS | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0,
                                 "final_logit_softcapping": 3.0, "num_hidden_layers": 4},
    "Gemma3Text": GEMMA | WINDOWS | {"query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    "Phi3": {"original_max_position_embeddings": 256},
}  # fmt: skip


def save_base(folder: Path, family: str, **more: object) -> Path:
    config = getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES[family] | more)
    tiny.save_model(config, folder, torch.bfloat16)
    gpt2_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama"), "Llama")


def convert(folder: Path, code: int = 0, **options: object) -> list[Path]:
    """The command's files in `folder`."""
    assert main(["gguf", *flags({"output_dir": folder} | options)]) == code
    return sorted(folder.glob("*.gguf"))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def tensors_of(file: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(file).tensors
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_logits_of_base_plus_adapter(family, tmp_path):
    base = save_base(tmp_path / "b", family)
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base, "train_type": "lora"}, size=0.005)
    (file,) = convert(tmp_path / "g", adapter=adapter, quantization="f32")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(model)
    truth = logits(PeftModel.from_pretrained(model, adapter).merge_and_unload())
    error = (LlamaCpp(file).logits(IDS) - truth).abs().max()
    assert error < 2e-3 * truth.abs().max()  # llama.cpp's kernels for CPUs round some products to float16
    assert (before - truth).abs().max() > 20 * error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "file_type", "width"),
    [("q4_k_m", 15, 256), ("q5_k_m", 17, 256), ("q6_k", 18, 256), ("q4_k_m", 15, 64)],
)
def test_types_and_bytes_are_those_of_llama_quantize(quantization, file_type, width, tmp_path):
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 9, "rope_parameters": None}
    base = save_base(tmp_path / "b", "Llama", **shape, tie_word_embeddings=quantization == "q5_k_m")
    (plain,) = convert(tmp_path / "f", model_name=base, quantization="f32")
    (ours,) = convert(tmp_path / "g", model_name=base, quantization=quantization, quantization_workers=2)
    theirs = gguf.GGUFReader(quantized(plain, tmp_path / "theirs.gguf", file_type)).tensors
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    assert found.keys() == {tensor.name for tensor in theirs}
    kinds = set()
    for tensor in theirs:
        assert found[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert found[tensor.name].data.tobytes() == tensor.data.tobytes(), tensor.name
        kinds.add(tensor.tensor_type.name)
    assert len(kinds) > (2 if "m" in quantization else 1)


@pytest.mark.parametrize(("quantization", "most"), [("f16", 2e-3), ("bf16", 5e-3), ("q8_0", 0.01)])
def test_a_file_reads_back_as_the_merged_weights(llama, quantization, most, tmp_path):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    (exact,) = convert(tmp_path / "f", adapter=adapter, quantization="f32")
    (file,) = convert(tmp_path / "g", adapter=adapter, quantization=quantization)
    truth, found = tensors_of(exact), tensors_of(file)
    assert found.keys() == truth.keys()
    for name, tensor in found.items():
        assert (tensor - truth[name]).norm() < most * truth[name].norm(), name
    assert any(not torch.equal(tensor, truth[name]) for name, tensor in found.items())


def test_a_merged_folder_and_its_adapter_with_base_give_the_same_file(llama, tmp_path):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    assert (
        main(["merge", *flags({"adapter": adapter, "output_dir": tmp_path / "m", "dtype": "fp32", "check_rows": 0})])
        == 0
    )
    (one,) = convert(tmp_path / "f", adapter=adapter, quantization="q8_0")
    (other,) = convert(tmp_path / "g", model_name=tmp_path / "m", quantization="q8_0")
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Phi3"])
@pytest.mark.parametrize("rslora", ["true", "false"])
def test_an_adapter_alone_adds_to_the_bases_file_what_merging_does(family, rslora, tmp_path):
    base = save_base(tmp_path / "b", family)
    asked = {"model_name": base, "train_type": "lora", "use_rslora": rslora, "lora_alpha": 5}
    adapter = save_random_adapter(tmp_path / "a", asked)
    (alone,) = convert(tmp_path / "l", adapter=adapter, lora_only=True, quantization="f32")
    (plain,) = convert(tmp_path / "f", model_name=base, quantization="f32")
    (merged,) = convert(tmp_path / "g", adapter=adapter, quantization="f32")
    fields = gguf.GGUFReader(alone).fields
    assert [fields[f"{key}"].contents() for key in ("general.type", "adapter.type")] == ["adapter", "lora"]
    loras, before, truth = tensors_of(alone), tensors_of(plain), tensors_of(merged)
    names = [name.removesuffix(".lora_a") for name in loras if name.endswith(".lora_a")]
    scale = fields["adapter.lora.alpha"].contents() / loras[f"{names[0]}.lora_b"].shape[1]  # as llama.cpp has it
    for name in names:
        summed = before[name] + scale * loras[f"{name}.lora_b"] @ loras[f"{name}.lora_a"]
        torch.testing.assert_close(summed, truth[name], rtol=1e-5, atol=1e-6)
    assert {name for name in truth if not torch.equal(truth[name], before[name])} == set(names)


def test_an_adapter_alone_is_halved_by_default_and_llama_cpp_opens_it(llama, tmp_path):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    (alone,) = convert(tmp_path / "l", adapter=adapter, lora_only=True)
    assert alone.name.endswith("-lora-F16.gguf")
    (plain,) = convert(tmp_path / "f", model_name=llama, quantization="f16")
    assert LlamaCpp(plain).model.lora_adapter_init(str(alone)) is not None
    assert f"ADAPTER ./{alone.name}" in alone.with_name(f"{alone.stem}.Modelfile").read_text()


TEXTS = (
    "hello yellow mellow\n\n  fellow 12345 I'll  be\tthere",
    "Below is an instruction that describes a task.\nÄöü 你好 🙂",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
)


def tokens_are_equal(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ours = LlamaCpp(file)
    for text in TEXTS:
        assert ours.tokens(text) == tokenizer(text)["input_ids"], text


def test_llama_cpp_makes_the_tokens_of_a_byte_level_bpe(llama, tmp_path):
    (file,) = convert(tmp_path / "g", model_name=llama, quantization="f16")
    tokenizer = gpt2_tokenizer()
    tokens_are_equal(file, tokenizer)
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    said = file.with_name(f"{file.stem}.Modelfile").read_text()
    assert 'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}' in said
    assert f"FROM ./{file.name}" in said


@pytest.mark.parametrize("with_model", [True, False])
def test_llama_cpp_makes_the_tokens_of_a_sentencepiece_model(with_model, tmp_path):
    base = save_base(tmp_path / "b", "Llama")
    for file in base.glob("tokenizer*"):
        file.unlink()
    tokenizer = llama2_tokenizer(base, sentencepiece_model(tmp_path))
    tokenizer.save_pretrained(base)
    if not with_model:
        (base / "tokenizer.model").unlink()
    (file,) = convert(tmp_path / "g", model_name=base, quantization="f16")
    tokens_are_equal(file, tokenizer)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "adapter null (its default) with model_name null (its default): there is nothing to write"),
        ({"model_name": "{b}", "lora_only": "true"}, "--lora_only true: has no effect with adapter null"),
        ({"adapter": "{a}", "lora_only": "true", "quantization": "q8_0"}, "an adapter is small and stays in floating"),
        ({"model_name": "{b}", "quantization": "q3_k"}, "'q3_k' is not allowed; did you mean q6_k?"),
        ({"model_name": "{gpt}"}, "model_name: a bloom model is not written as GGUF here; known are llama, mistral"),
        ({"model_name": "{cut}"}, "model_name: its tokenizer (BPE, ByteLevel) splits text as none of those"),
        ({"model_name": "{big}"}, "and its embedding 300 rows: they do not match"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(llama, tmp_path, capsys, change, says):
    places = {
        "b": llama,
        "a": tmp_path / "a",
        "gpt": tmp_path / "gpt",
        "cut": tmp_path / "cut",
        "big": tmp_path / "big",
    }
    save_random_adapter(places["a"], {"model_name": llama})
    tiny.save_model(transformers.BloomConfig(**tiny.SHAPE | {"tie_word_embeddings": True}), places["gpt"])
    tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE), places["cut"])
    save_base(places["big"], "Llama", vocab_size=300)
    capsys.readouterr()
    files = convert(tmp_path / "g", 2, **{name: value.format(**places) for name, value in change.items()})
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1, said
    assert not files


def test_a_file_that_is_there_is_kept_unless_it_may_be_replaced(llama, tmp_path, capsys):
    (file,) = convert(tmp_path, model_name=llama, quantization="f16")
    before = file.stat().st_mtime_ns
    convert(tmp_path, 2, model_name=llama, quantization="f16")
    assert "is there already" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == before
    convert(tmp_path, model_name=llama, quantization="f16", overwrite_output_dir=True)
    assert file.stat().st_mtime_ns != before
    convert(tmp_path, model_name=llama, quantization="q8_0")  # another beside it


def test_a_window_or_scale_that_llama_cpp_does_not_have_is_refused(tmp_path, capsys):
    for name, more, says in (
        ("w", {"layer_types": ["full_attention"] * 6}, "gives each 6th layer full attention"),
        ("s", {"query_pre_attn_scalar": 24}, "scales attention by 16 here and the config.json by 24"),
    ):
        base = save_base(tmp_path / name, "Gemma3Text", **more)
        convert(tmp_path / "g", 2, model_name=base, quantization="f16")
        assert says in capsys.readouterr().err


def test_padding_of_the_embedding_is_no_word():
    vocabulary = read_vocabulary(gpt2_tokenizer(), 448, None)
    assert vocabulary.tokens[447] == b"[PAD447]"
    assert vocabulary.types[447] == gguf.TokenType.UNUSED
