"""A real model's tokenizer in a GGUF file: llama.cpp makes of every text the tokens that transformers makes."""

import json
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

gguf = pytest.importorskip("gguf")
pytest.importorskip("cyllama")

from tests.export.test_gguf import convert, save_base  # noqa: E402
from tests.support.llama_cpp import LlamaCpp  # noqa: E402
from tests.support.torchrun import ROOT  # noqa: E402

SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
TEXTS = (
    "", " ", "  ", "\n", "\n\n\n", " \n \n", "\t\tx", "\r\nend\r\n", "trailing   ", "   leading", "a\u00a0b\u2003c",
    "Hello, world!", "I'll they've DON'T we'd it's", "'s 'S 'll x'y", "state-of-the-art", "snake_case and CamelCase",
    "1234567890", "3.14159 -2,718 1e-9", "v1.2.3-rc4", "a1b22c333", "٣٤٥ ४५६ Ⅷ ½ x²", "12 345,67 €",
    "naïve café Zürich Straße", "e\u0301 versus é", "İstanbul \u0131l\u0131k ß ẞ", "Привет, мир! Ёлка", "Ελληνικά",
    "שלום עולם", "مرحبا بالعالم", "你好\uff0c世界。", "日本語のテキストとカタカナ", "한국어", "ไทย", "🙂👩‍👩‍👧🏽🇩🇪",
    "zero\u200bwidth\u200djoin", "\ufeffmark", "\u202eright to left", "null\x01\x1f\x7f", "\ud7ff\ue000\uffff",
    "if x:\n    return {'a': [1, 2]}\n\n\tpass", "<html>&amp;</html>", "http://example.com/?q=1&r=2#f", "!!!???...---",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>", "a<|im_end|>b", " <|im_end|> ",
    "<|im_start|", "<|IM_START|>", "<|im_start|><|im_start|>", "<repo_name>x<file_sep>y<issue_start>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "Donaudampfschifffahrtsgesellschaftskapitän",
)  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# llama.cpp's name of how text is split -> the tokenizer's: SmolLM2's is published so, and came out of a GGUF file so.
SPLITS = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
    "gpt-2": BYTES,
}

pytestmark = pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"no {SMOLLM2.name}: see launch/get_smollm2.py")


@pytest.fixture(scope="module", params=SPLITS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tokenizer."""
    folder = save_base(tmp_path_factory.mktemp("model"), "Llama", vocab_size=49152, num_hidden_layers=1)
    AutoTokenizer.from_pretrained(SMOLLM2).save_pretrained(folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["pre_tokenizer"] = SPLITS[request.param]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    (file,) = convert(folder / "gguf", model_name=folder, quantization="q8_0")
    return file


@pytest.fixture(scope="module")
def llama_cpp(file: Path) -> LlamaCpp:
    return LlamaCpp(file)


@pytest.mark.slow
def test_tokens_of_texts_are_transformers(llama_cpp, tokenizer):
    wrong = [text for text in TEXTS if llama_cpp.tokens(text) != tokenizer(text)["input_ids"]]
    assert not wrong


@pytest.mark.slow
def test_tokens_of_every_character_are_transformers(llama_cpp, tokenizer):
    """Between letters, behind a space, twice and between digits: the places that splitting a text tells apart."""
    assigned = [chr(code) for code in range(1, 0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")]
    assert len(assigned) > 100_000
    wrong = []
    for first in range(0, len(assigned), 100):
        text = "".join(f"a{one}b {one}{one} 1{one}2 \n{one}" for one in assigned[first : first + 100])
        if llama_cpp.tokens(text) != tokenizer(text)["input_ids"]:
            wrong.append(f"U+{ord(assigned[first]):04X}")
    assert not wrong


@pytest.mark.slow
def test_special_tokens_and_the_chat_template_are_the_tokenizers(file, llama_cpp, tokenizer, request):
    fields = gguf.GGUFReader(file).fields
    found = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "bos_token_id", "eos_token_id")}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    assert found == {"pre": request.node.callspec.params["folder"]} | ends
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    for token, number in tokenizer.get_added_vocab().items():
        assert llama_cpp.tokens(token) == [number]
    turns = [{"role": "user", "content": "Ants? Bees!\n"}, {"role": "assistant", "content": "42"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert llama_cpp.tokens(text) == tokenizer.apply_chat_template(turns)["input_ids"]
