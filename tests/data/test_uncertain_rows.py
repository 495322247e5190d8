"""Rows that do not say for certain what is learnt: refused with their line; and what is taken otherwise is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_chat import spans
from test_data import learnt, load, write
from test_turns import HARMONY, tokenizer_for

from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import CHATML, bytes_tokenizer

IM = "<|im_end|>"
USER, SAID = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yellow"}
SYSTEM = {"role": "system", "content": "mellow"}


def chat() -> Any:
    return bytes_tokenizer(eos=IM, chat_template=CHATML)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "null without a call": ({"messages": [USER, {**SAID, "content": None}]}, "message 1: its content is null"),
    "null with null calls": (
        {"messages": [USER, {**SAID, "content": None, "tool_calls": None}]}, "message 1: its content is null",
    ),
    "a part of a turn": (
        {"messages": [USER, {**SAID, "train_detail": [{"begin_offset": 0}]}]}, "its 'train_detail' asks for a part",
    ),
    "an answer that is an object": ({"messages": [USER, {**SAID, "content": {"a": 1}}]}, "must be text, but is dict"),
    "a key twice in JSON text": (
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]'},
        "'content' is given twice in one object",
    ),
    "KTO of messages": ({"messages": [USER, SAID], "label": False}, "its label column says which answers"),
    "KTO of instructions": ({"instruction": "a", "output": "b", "label": True}, "its label column says which answers"),
    "LLaMA-Factory's KTO": ({"messages": [USER, SAID], "kto_tag": True}, "its kto_tag column says which answers"),
    **{
        f"{name} for the template": (
            {"messages": [USER, SAID], "chat_template_kwargs": {name: True}}, "'chat_template_kwargs' must be",
        )
        for name in ("continue_final_message", "padding", "return_tensors", "add_generation_prompt")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_learnt_must_be_certain(tmp_path: Path, name: str) -> None:
    given, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        load(write(tmp_path / "a.jsonl", [given, given]), chat())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tools_result_may_be_an_object(tmp_path: Path) -> None:
    tokenizer = chat()
    talk = [USER, {"role": "tool", "content": {"a": 1}}, SAID]
    rows = load(write(tmp_path / "a.jsonl", [{"messages": talk}]), tokenizer)
    assert '{"a": 1}' in tokenizer.decode(rows.ids)
    assert spans(rows, 0, tokenizer) == ["yellow" + IM]


def test_a_verdict_that_is_none_is_taken_where_the_form_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "label": True}])
    assert "columns not used: label" in load(path, chat(), dataset_format="alpaca").summary


END_ALONE = "an answer without text, of which its end is learnt (2 rows)"
TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "an empty output": ({"instruction": "a", "output": ""}, END_ALONE),
    "a blank completion": ({"prompt": "a", "completion": " \n"}, END_ALONE),
    "an empty turn": ({"messages": [USER, {**SAID, "content": ""}]}, END_ALONE),
    "a marked user": ({"messages": [{**USER, "weight": 1}, SAID]}, "a user turn is marked to be learnt, but only the"),
    "two system texts": (
        {"messages": [SYSTEM, USER, SAID], "system": "yellow"}, "system column not taken, as messages begin with",
    ),
    "two system texts, one a developer's": (
        {"messages": [{**SYSTEM, "role": "developer"}, USER, SAID], "system": "yellow"}, "system column not taken",
    ),
    "a setting that nothing reads": (
        {"messages": [USER, SAID], "chat_template_kwargs": {"enable_thinking": False}}, "'enable_thinking' of chat_",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_what_is_taken_otherwise_is_told(tmp_path: Path, name: str) -> None:
    given, words = TOLD[name]
    assert words in load(write(tmp_path / "a.jsonl", [given, given]), chat()).summary


def test_an_empty_turn_whose_end_is_not_certain_is_told(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(HARMONY, "<|return|>")
    talk = [USER, {**SAID, "content": ""}, USER, SAID]
    rows = load(write(tmp_path / "a.jsonl", [{"messages": talk}]), tokenizer)
    assert len(spans(rows, 0, tokenizer)) == 1
    assert "an answer without text, of which nothing is learnt (1 row)" in rows.summary


def test_content_that_is_null_beside_a_value_is_the_value(tmp_path: Path) -> None:
    tokenizer = chat()
    said = {"from": "gpt", "content": None, "value": "yellow"}
    assert spans(load(write(tmp_path / "a.jsonl", [{"messages": [USER, said]}]), tokenizer), 0, tokenizer) == [
        "yellow" + IM
    ]


def template(tmp_path: Path, text: str) -> str:
    (tmp_path / "p.jinja").write_text(text)
    return str(tmp_path / "p.jinja")


GENERATES = "{{ question }}: {% generation %}{{ answer }}{% endgeneration %}"


@pytest.mark.parametrize(
    ("text", "row", "words"),
    [
        ("{{ question }} {{ answer }}", {"question": "q", "answer": "a"}, "shows the answer 'answer' already"),
        ("{{ question }}", {"question": "q", "answer": "a", "output": "b"}, "may have its answer in answer or output"),
        (GENERATES, {"question": "\ue0f0q\ue0f1", "answer": "a"}, "by which what is learnt is marked"),
        (GENERATES, {"question": "q", "answer": ["\ue0f1"]}, "by which what is learnt is marked"),
    ],
)
def test_a_prompt_templates_answer_must_be_certain(tmp_path: Path, text: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(write(tmp_path / "a.jsonl", [row]), chat(), prompt_template=template(tmp_path, text))
    assert words in str(caught.value)
    assert "line 1" in str(caught.value)


def test_columns_say_which_answer_a_prompt_template_has(tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "a.jsonl", [{"q": "hello ", "answer": "mellow", "solution": "yellow"}]), chat()
    asked = template(tmp_path, "{{ q }}")
    rows = load(path, tokenizer, prompt_template=asked, columns=["output=solution"])
    assert learnt(rows, 0, tokenizer) == "yellow" + IM


def test_marks_within_marks_are_the_outer_ones(tmp_path: Path) -> None:
    tokenizer = chat()
    nested = GENERATES.replace("{{ answer }}", "<{% generation %}{{ answer }}{% endgeneration %}>")
    path = write(tmp_path / "a.jsonl", [{"question": "hello", "answer": "yellow"}])
    rows = load(path, tokenizer, prompt_template=template(tmp_path, nested))
    assert learnt(rows, 0, tokenizer) == "<yellow>" + IM
    assert "\ue0f1" not in tokenizer.decode(rows.ids)


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        (
            {"prompt": "a", "completion": "b", "x": "c"},
            "system=x",
            "system=x has no effect on rows of the form prompt_co",
        ),
        (
            {"prompt": "a", "completion": "b", "x": "c"},
            "output=x",
            "output=x has no effect on rows of the form prompt_co",
        ),
        ({"text": "a", "x": "c"}, "context=x", "context=x has no effect on rows of the form text"),
    ],
)
def test_a_named_column_that_no_field_takes_is_refused(tmp_path: Path, row: Any, columns: str, words: str) -> None:
    with pytest.raises(UserError, match="line 1: columns: ") as caught:
        load(write(tmp_path / "a.jsonl", [row]), chat(), columns=[columns])
    assert words in str(caught.value)


def test_options_must_have_an_effect_on_one_dataset_of_several(tmp_path: Path) -> None:
    text = write(tmp_path / "t.jsonl", [{"text": "hello"}] * 3)
    talk = write(tmp_path / "m.jsonl", [{"messages": [USER, SAID]}] * 3)
    own = template(tmp_path, CHATML)
    assert load(f"{text},{talk}", chat(), chat_template=own, text_overflow="cut", train_on_prompt=True).n_read == 6
    for given in ({"chat_template": own}, {"train_on_prompt": True}):
        with pytest.raises(UserError, match="has no effect on rows of the form text"):
            load(text, chat(), **given)
        with pytest.raises(UserError, match="has no effect on rows of the form text"):
            load(f"{text},{write(tmp_path / 'u.jsonl', [json.loads(json.dumps({'text': 'x y'}))])}", chat(), **given)


def test_a_question_of_messages_with_an_answer_of_text_is_called_that(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": [USER], "answer": "42"}])
    with pytest.raises(UserError, match=r"'completion' must be a list of .*, but is str"):
        load(path, chat())
