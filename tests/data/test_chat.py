"""Conversations: exactly the assistant's words are learnt, whatever the habits of the chat template."""

import json
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data.batches import Rows, load_rows
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import (
    CHATML,
    LLAMA2,
    OPEN_THOUGHT,
    PHI3,
    PLAIN,
    QWEN3,
    QWEN3_THOUGHT,
    bytes_tokenizer,
)

TALK = [
    {"role": "user", "content": "hel"},
    {"role": "assistant", "content": "<b>lo assistant</b>"},  # a tag, and a word of the header
    {"role": "user", "content": "hello user"},
    {"role": "assistant", "content": "yellow"},
]
SYSTEM = {"role": "system", "content": "system says hello"}

TEMPLATES = {
    # name: template, EOS, what is learnt of TALK
    "chatml": (CHATML, "<|im_end|>", "<b>lo assistant</b><|im_end|>", "yellow<|im_end|>"),
    "llama2": (LLAMA2, "</s>", " <b>lo assistant</b> </s>", " yellow </s>"),
    "qwen3": (QWEN3, "<|im_end|>", "<b>lo assistant</b><|im_end|>", "<think>\n\n</think>\n\nyellow<|im_end|>"),
    "open thought": (OPEN_THOUGHT, "<|im_end|>", "<b>lo assistant</b><|im_end|>", "yellow<|im_end|>"),
    "phi3": (PHI3, "</s>", "<b>lo assistant</b><|im_end|>", "yellow<|im_end|>\n</s>"),
    "plain": (PLAIN, "</s>", "<b>lo assistant</b>\n", "yellow\n</s>"),
    "gemma": (CHATML, "</s>", "<b>lo assistant</b><|im_end|>", "yellow<|im_end|>"),  # EOS is not what ends a turn
}


def load(folder: Path, talks: list[Any], tokenizer: Any, **options: Any) -> Rows:
    path = folder / "talk.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return load_rows(DataOptions(dataset=str(path), **options), tokenizer, 50_000)


def spans(rows: Rows, number: int, tokenizer: Any) -> list[str]:
    """The stretches of a row that are learnt, as text."""
    part = slice(rows.offsets[number], rows.offsets[number + 1])
    found: list[list[int]] = []
    before = False
    for token, learn in zip(rows.ids[part].tolist(), rows.trains[part].tolist(), strict=True):
        if learn:
            found = [*found[:-1], [*found[-1], token]] if before else [*found, [token]]
        before = learn
    return [tokenizer.decode(span) for span in found]


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_assistants_turns_are_learnt(tmp_path: Path, name: str) -> None:
    template, eos, *answers = TEMPLATES[name]
    tokenizer = bytes_tokenizer(bos=True, eos=eos, chat_template=template)
    rows = load(tmp_path, [TALK, TALK[:2]], tokenizer)
    assert rows.form == "messages"
    assert spans(rows, 0, tokenizer) == answers
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    decoded = tokenizer.decode(rows.ids[: rows.offsets[1]])
    assert decoded.rstrip() in (
        whole.rstrip(),
        whole + eos,
    )  # the template's text, and EOS where it leaves the end open
    asked = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    if name != "open thought":  # what generation starts from is how the row begins, token for token
        assert rows.ids[: len(asked)].tolist() == asked
        assert rows.trains[: len(asked) + 1].tolist() == [False] * len(asked) + [True]
    assert [token for token in rows.ids[: rows.offsets[1]].tolist() if token == 1] == [1] * whole.count("<s>")


def test_thoughts_that_the_template_drops_later(tmp_path: Path) -> None:
    """Qwen 3 shows an answer's thought while the answer is the last, and drops it from the middle of a conversation."""
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=QWEN3_THOUGHT)
    thought = {"role": "assistant", "content": "<think>\nhello?\n</think>\n\nyellow"}
    rows = load(tmp_path, [[TALK[0], thought, *TALK[2:]], [TALK[0], thought]], tokenizer)
    assert spans(rows, 0, tokenizer) == ["yellow<|im_end|>", "yellow<|im_end|>"]
    assert spans(rows, 1, tokenizer) == ["<think>\nhello?\n</think>\n\nyellow<|im_end|>"]


def test_system_words_and_open_ends_are_not_learnt(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    rows = load(tmp_path, [[SYSTEM, *TALK[:3]], [SYSTEM, TALK[0]], TALK[1:]], tokenizer)
    assert spans(rows, 0, tokenizer) == ["<b>lo assistant</b><|im_end|>"]
    assert (rows.n_dropped, rows.index.tolist()) == (1, [0, 2])  # a question without an answer teaches nothing
    first = spans(rows, 1, tokenizer)[0]
    assert first.endswith("<b>lo assistant</b><|im_end|>")


def test_train_on_prompt_learns_every_turn(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    rows = load(tmp_path, [TALK], tokenizer, train_on_prompt=True)
    assert rows.trains[1:].all()
    assert not rows.trains[0]


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (None, TALK, "the model's tokenizer has no chat template"),
        (LLAMA2, TALK[1:], r"line 1: the model's chat template does not take these messages \(roles must alternate\)"),
        (CHATML, "hello", "line 1: 'messages' must be a list of {role, content}, but is str"),
        (CHATML, [{"role": "user"}], "line 1: message 0 must be an object with 'role' and 'content'"),
        (CHATML, [*TALK[:1], {"role": "assistant", "content": [{"type": "image"}]}], "has a part of type 'image'"),
        (CHATML, [], "'messages' is an empty list"),
        ("{{ 'hello' }}", TALK, "message 1 is not in what it renders"),
    ],
)
def test_conversations_that_cannot_be_taken(tmp_path: Path, template: str | None, talk: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, [talk], bytes_tokenizer(chat_template=template))
