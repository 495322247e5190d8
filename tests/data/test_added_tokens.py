"""Added tokens that swallow the space around them, as Phi-3's do: a row is the whole text's tokens."""

from pathlib import Path
from typing import Any

import pytest
from test_chat import load
from tokenizers import AddedToken

from fsdp_qlora.data.asked import continuations
from tests.support.small_tokenizers import bytes_tokenizer, spaced_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": " yellow"},
    {"role": "user", "content": "more "}, {"role": "assistant", "content": "fellow\n"},
]  # fmt: skip


def tokenizer_with(before: bool, behind: bool, family: str) -> Any:
    tokenizer = bytes_tokenizer() if family == "bytes" else spaced_tokenizer()
    for word in ("<|end|>", "<|user|>", "<|assistant|>"):
        tokenizer.add_tokens([AddedToken(word, lstrip=before, rstrip=behind, normalized=False, special=True)])
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<|end|>"
    return tokenizer


@pytest.mark.parametrize("family", ["bytes", "spaced"])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_row_is_what_the_tokenizer_makes_of_the_whole_text(
    tmp_path: Path, before: bool, behind: bool, family: str
) -> None:
    tokenizer = tokenizer_with(before, behind, family)
    rows = load(tmp_path, [TALK], tokenizer)
    whole = tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)["input_ids"]
    assert rows.ids.tolist() == whole
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for said in (1, 3):  # learnt from where generation begins, through the end token
        asked = tokenizer.apply_chat_template(TALK[:said], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        stop = whole.index(end, start) + 1
        assert rows.trains[start:stop].all()
        assert not rows.trains[start - 1]
        assert stop == len(whole) or not rows.trains[stop]


def test_only_the_token_that_lies_across_an_edge_is_two(tmp_path: Path) -> None:
    """The header's line break and the answer's are one token of the whole text; all else stays as it is there."""
    tokenizer = tokenizer_with(False, False, "spaced")
    talk = [*TALK[:3], {"role": "assistant", "content": "\n\nyellow"}]
    rows = load(tmp_path, [talk], tokenizer)
    whole = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)
    tokens, both = whole.tokens(), rows.ids.tolist()
    assert tokens.count("\n\n") == 1
    at = tokens.index("\n\n")
    assert tokenizer.convert_ids_to_tokens(both[at - 1 : at + 2]) == ["▁", "\n", "\n\n"]
    assert [*both[:at], *both[at + 2 :]] == [*whole["input_ids"][:at], *whole["input_ids"][at + 2 :]]


def test_characters_that_the_tokenizer_does_not_know_are_told(tmp_path: Path) -> None:
    told = "characters that the tokenizer does not know, taken for its unknown token (1 row)"
    talks = [TALK[:2], [TALK[0], {**TALK[1], "content": "日本"}], [TALK[0], {**TALK[1], "content": "<unk>"}]]
    assert told in load(tmp_path, talks, tokenizer_with(False, False, "spaced")).summary
    assert "does not know" not in load(tmp_path, talks, tokenizer_with(False, False, "bytes")).summary


def test_a_choice_begins_as_an_answer_does(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(False, True, "spaced")
    rows = load(tmp_path, [[TALK[0], {**TALK[1], "content": "yellow"}]], tokenizer)
    asked = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    choice = continuations(tokenizer, ["yellow"], asked, "messages")[0]
    assert choice == rows.ids[rows.trains].tolist()[:-1]
