"""GGUF files are what llama.cpp makes and opens: its logits are transformers', its tokens the tokenizer's."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AddedToken, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

gguf = pytest.importorskip("gguf")
pytest.importorskip("libggml")
pytest.importorskip("cyllama")

from fsdp_qlora.__main__ import main  # noqa: E402
from fsdp_qlora.errors import UserError  # noqa: E402
from fsdp_qlora.export import merged  # noqa: E402
from fsdp_qlora.export.gguf.families import family_of  # noqa: E402
from fsdp_qlora.export.gguf.metadata import general_name  # noqa: E402
from fsdp_qlora.export.gguf.vocabulary import read_vocabulary  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.llama_cpp import LlamaCpp, quantized  # noqa: E402
from tests.support.runs import flags  # noqa: E402
from tests.support.saved_adapters import save_random_adapter  # noqa: E402
from tests.support.small_tokenizers import gpt2_tokenizer, llama2_tokenizer, sentencepiece_model  # noqa: E402
from tests.support.tiers import some_slow  # noqa: E402

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


@pytest.mark.parametrize("family", some_slow(FAMILIES, 2))
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
def test_types_and_bytes_are_those_of_llama_quantize(quantization, file_type, width, tmp_path, capsys):
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 9, "rope_parameters": None}
    base = save_base(tmp_path / "b", "Llama", **shape, tie_word_embeddings=quantization == "q5_k_m")
    (plain,) = convert(tmp_path / "f", model_name=base, quantization="f32")
    capsys.readouterr()
    (ours,) = convert(tmp_path / "g", model_name=base, quantization=quantization, quantization_workers=2)
    assert ("matrices have rows of no multiple of 256 numbers" in capsys.readouterr().out) is (width == 64)
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


def test_an_adapter_alone_is_halved_by_default_and_llama_cpp_opens_it(llama, tmp_path, monkeypatch):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    monkeypatch.chdir(llama)
    (alone,) = convert(tmp_path / "l", adapter=adapter, lora_only=True, model_name=".")
    assert alone.name == f"{llama.name}-lora-F16.gguf"
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
        ({"model_name": "{b}", "merge_base": "trained"}, "--merge_base trained: has no effect with adapter null"),
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


def test_added_tokens_without_a_row_are_left_out(tmp_path, capsys):
    tokenizer = gpt2_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    vocabulary = read_vocabulary(tokenizer, rows, None)
    assert vocabulary.dropped == ["[PAD]"]
    assert "pad" not in vocabulary.special
    assert len(vocabulary.tokens) == rows
    with pytest.raises(UserError, match="they do not match; name the model"):
        read_vocabulary(gpt2_tokenizer(), 300, None)
    base = save_base(tmp_path / "b", "Llama", vocab_size=rows, num_hidden_layers=1)
    tokenizer.save_pretrained(base)
    (file,) = convert(tmp_path / "g", model_name=base, quantization="f16")
    assert "tokens without a row in the embedding are left out: [PAD]" in capsys.readouterr().out
    tokens_are_equal(file, gpt2_tokenizer())


def test_tokens_of_the_same_text_are_refused(monkeypatch):
    tokenizer = gpt2_tokenizer()
    vocabulary = tokenizer.get_vocab() | {"[PAD447]": 440}  # the name that a row without a token gets
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocabulary)
    with pytest.raises(UserError, match=r"has several tokens '\[PAD447\]'"):
        read_vocabulary(tokenizer, 448, None)


def phi3_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = gpt2_tokenizer()
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer


def stripping(side: str, names: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = phi3_tokenizer()
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    chosen = [name for name in added if name in names]
    tokenizer.add_tokens([AddedToken(name, special=added[name].special, **{side: True}) for name in chosen])
    assert [getattr(added, side) for added in tokenizer.added_tokens_decoder.values() if added.content in names]
    return tokenizer


def test_white_space_behind_special_tokens_is_stripped_for_phi_3_alone():
    names = [token.content for token in phi3_tokenizer().added_tokens_decoder.values()]
    ours = [name for name in names if name not in ("<unk>", "<s>", "<|endoftext|>")]
    assert read_vocabulary(stripping("rstrip", ours), 448, None).strips
    assert not read_vocabulary(phi3_tokenizer(), 448, None).strips
    without = gpt2_tokenizer()  # it has no <|endoftext|>
    without.add_tokens([AddedToken(name, special=True, rstrip=True) for name in ours if name != "<|endoftext|>"])
    for tokenizer, says in (
        (stripping("lstrip", ours[-1:]), "strips white space around"),
        (stripping("rstrip", ours[-1:]), "strips white space around"),  # llama.cpp would strip behind the others too
        (without, "opens no Phi-3 whose tokenizer lacks"),
    ):
        with pytest.raises(UserError, match=says):
            read_vocabulary(tokenizer, 448, None)
    assert general_name("tuned", strips=True) == "phi-3 tuned"
    assert general_name("Phi-3-mini", strips=True) == "Phi-3-mini"
    assert general_name("Phi-3-mini", strips=False) == "Phi 3-mini"


def test_llama_cpp_strips_behind_special_tokens_as_phi_3s_tokenizer(tmp_path):
    names = [token.content for token in phi3_tokenizer().added_tokens_decoder.values()]
    tokenizer = stripping("rstrip", [name for name in names if name not in ("<unk>", "<s>", "<|endoftext|>")])
    base = save_base(tmp_path / "b", "Phi3", num_hidden_layers=1)
    tokenizer.save_pretrained(base)
    (file,) = convert(tmp_path / "g", model_name=base, quantization="f16")
    text = "<|im_start|>  user\nhello<|im_end|>\n\n<|im_start|> hello"
    assert tokenizer(text)["input_ids"] != phi3_tokenizer()(text)["input_ids"]
    assert LlamaCpp(file).tokens(text) == tokenizer(text)["input_ids"]


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def config_of(family: str, **more: object) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES[family] | more)


@pytest.mark.parametrize(
    ("family", "rope", "says"),
    [
        ("Llama", YARN, None),
        ("Qwen2", YARN | {"attention_factor": 1.138629436}, None),  # what it is without
        ("Qwen2", YARN | {"attention_factor": 1.0}, "scales yarn attention by 1.13863 here and the model by 1"),
        ("Qwen3", YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "scales yarn attention"),
        ("Llama", YARN | {"truncate": False}, "truncate true only"),
        ("Llama", YARN | {"beta_fast": 32.0, "beta_slow": 1}, None),
        ("Llama", YARN | {"beta_fast": 8.0}, "beta_fast 32 and beta_slow 1 only, and the model has 8 and 1"),
        ("Qwen2", YARN | {"beta_slow": 2.0}, "and the model has 32 and 2"),
        ("Llama", LONG, "type longrope are not written as GGUF for llama"),
        ("Qwen2", LLAMA3, "type llama3 are not written"),
        ("Gemma", LINEAR, "type linear are not written"),
        ("Phi3", LONG, None),
        ("Phi3", LONG | {"attention_factor": 1.0}, "scales longrope attention"),
        ("Gemma3Text", {"full_attention": LINEAR, "sliding_attention": DEFAULT}, None),
        ("Gemma3Text", {"full_attention": LINEAR, "sliding_attention": LINEAR}, "type linear are not written"),
    ],
)  # fmt: skip
def test_rotary_positions_are_those_that_llama_cpp_turns(family, rope, says):
    more = {"original_max_position_embeddings": 64} if rope is LONG or "long_factor" in rope else {}
    config = config_of(family, rope_parameters=rope, **more)
    if says is None:
        family_of(config)
    else:
        with pytest.raises(UserError, match=says):
            family_of(config)


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("Gemma2", {"attn_logit_softcapping": None}, "always softcaps"),
        ("Gemma2", {"final_logit_softcapping": None}, "always softcaps"),
        ("Llama", {"hidden_act": "gelu"}, "computes silu for llama, and this model gelu"),
        *(
            (name, {"attention_bias": True}, "no biases of attention")
            for name in ("Qwen3", "Gemma", "Gemma2", "Gemma3Text")
        ),
        (
            "Gemma3Text",
            {"hidden_activation": "silu"},
            "computes gelu_pytorch_tanh for gemma3_text, and this model silu",
        ),
    ],
)
def test_a_graph_that_llama_cpp_does_not_have_is_refused(family, more, says):
    family_of(config_of(family))
    with pytest.raises(UserError, match=says):
        family_of(config_of(family, **more))


def test_longrope_beyond_its_context_is_the_models_and_what_differs_below_is_told(tmp_path, capsys):
    rope = LONG | {"original_max_position_embeddings": 16, "long_factor": [2.0 + i / 8 for i in range(8)]}
    base = save_base(tmp_path / "b", "Phi3", rope_parameters=rope, original_max_position_embeddings=16)
    (file,) = convert(tmp_path / "g", model_name=base, quantization="f32")
    assert "serve short ones with --ctx-size 16" in capsys.readouterr().out
    truth = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (LlamaCpp(file).logits(IDS) - truth).abs().max() < 2e-3 * truth.abs().max()


def test_an_adapter_that_is_damaged_or_too_large_for_f16_is_refused(llama, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    file = adapter / "adapter_model.safetensors"
    sound = load_file(file)
    for value, says in ((float("nan"), "holds NaN or infinity"), (7e4, "beyond float16's largest")):
        changed = {name: tensor.clone() for name, tensor in sound.items()}
        changed[max(changed)][0, 0] = value
        save_file(changed, file)
        assert not convert(tmp_path / "g", 2, adapter=adapter, lora_only=True)
        said = capsys.readouterr().err
        assert says in said
        assert len(said.splitlines()) == 1, said
    assert convert(tmp_path / "g", adapter=adapter, lora_only=True, quantization="bf16")
    assert not list((tmp_path / "g").glob(".*"))


def test_an_adapter_alone_is_not_written_to_a_full_disk_nor_of_a_tied_head(tmp_path, capsys, monkeypatch):
    base = save_base(tmp_path / "b", "Llama", tie_word_embeddings=True, num_hidden_layers=1)
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base})
    with monkeypatch.context() as patched:
        real = shutil.disk_usage(tmp_path)
        patched.setattr(shutil, "disk_usage", lambda folder: real._replace(free=1000))
        assert not convert(tmp_path / "g", 2, adapter=adapter, lora_only=True)
        assert "has 0.00 GiB free and the file will take" in capsys.readouterr().err
    file = adapter / "adapter_model.safetensors"
    head = {f"base_model.model.lm_head.lora_{which}.weight": torch.zeros(*shape)
            for which, shape in (("A", (4, 64)), ("B", (448, 4)))}  # fmt: skip
    save_file(load_file(file) | head, file)
    assert not convert(tmp_path / "g", 2, adapter=adapter, lora_only=True)
    assert "whose matrix is also the embedding (tied)" in capsys.readouterr().err


def test_a_model_that_is_published_in_4_bits_is_written_as_what_it_decodes_to(llama, tmp_path):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    wide = save_base(tmp_path / "w", "Llama", intermediate_size=192, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(
        wide, dtype=torch.bfloat16, device_map="cpu", quantization_config=settings
    )
    model.save_pretrained(tmp_path / "4bit")
    gpt2_tokenizer().save_pretrained(tmp_path / "4bit")
    (quantized_file,) = convert(tmp_path / "g", model_name=tmp_path / "4bit", quantization="f32")
    (plain,) = convert(tmp_path / "f", model_name=wide, quantization="f32")
    found, exact = tensors_of(quantized_file), tensors_of(plain)
    assert found.keys() == exact.keys()
    error = {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in found}
    assert 0.02 < error["blk.0.ffn_up.weight"] < 0.2
    assert error["token_embd.weight"] == 0


def test_a_mistake_is_told_before_weights_are_fetched(tmp_path, capsys, monkeypatch):
    def fetched(*_):
        raise AssertionError("the weights are asked for")

    monkeypatch.setattr(merged, "_folder_of", fetched)
    base = save_base(tmp_path / "b", "Llama", num_hidden_layers=1)
    tiny.save_tokenizer(base)
    convert(tmp_path / "g", 2, model_name=base, quantization="f16")
    assert "splits text as none of those" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()


def test_what_a_killed_process_left_is_swept_and_a_modelfile_is_kept(llama, tmp_path, capsys):
    (tmp_path / "g").mkdir()
    name = f"{llama.name}-F16.gguf"
    part = tmp_path / "g" / f".{name}.{2**22 + 1}"  # beyond the largest number of a process
    part.write_bytes(b"half of it")
    written = tmp_path / "g" / f"{llama.name}-F16.Modelfile"
    written.write_text("mine")
    convert(tmp_path / "g", 2, model_name=llama, quantization="f16")
    assert not part.exists()
    assert written.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU quantizes as the training did")
def test_a_base_that_a_gpu_quantized_is_told(llama, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    (adapter / "plan.json").write_text('{"rates": {}}')
    convert(tmp_path / "g", adapter=adapter, quantization="f16")
    assert "note      the base was quantized on a GPU and is here on the CPU" in capsys.readouterr().out


def test_an_interruption_says_that_the_file_is_begun_anew(llama, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merged.Merged, "read", interrupted)
    assert not convert(tmp_path / "g", 130, model_name=llama, quantization="f16")
    assert "no part of a file is left, and the same command starts anew" in capsys.readouterr().err
    assert not list((tmp_path / "g").iterdir())
