"""Forms of rows: each recognised from its columns, exact words and labels, and what cannot be taken refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_chat import spans
from test_data import learnt, load, row, write

from fsdp_qlora.config.columns import FIELDS
from fsdp_qlora.data.forms import FORMS
from fsdp_qlora.data.show_rows import lines_of
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import CHATML, bytes_tokenizer

IM = "<|im_end|>"
USER, SAID = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yellow"}


def chat(**options: Any) -> Any:
    return bytes_tokenizer(eos=IM, chat_template=options.get("template", CHATML))


MESSAGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ShareGPT": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yellow"}]}, ["yellow"]),
    "ShareGPT with a system column": (
        {"system": "Be brief.",
         "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yellow"}]},
        ["yellow"],
    ),
    "names of the assistant": (
        {"messages": [message for role in ("model", "Assistant", "bot") for message in (USER, {**SAID, "role": role})]},
        ["yellow"] * 3,
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "yel"}, {"text": "low"}]}]},
        ["yellow"],
    ),
    "JSON text, as CSV holds it": ({"messages": json.dumps([USER, SAID])}, ["yellow"]),
    "OpenAI's weight": ({"messages": [USER, {**SAID, "weight": 0}, USER, {**SAID, "weight": 1}]}, ["yellow"]),
    "axolotl's train": ({"messages": [USER, {**SAID, "train": False}, USER, SAID]}, ["yellow"]),
    "prompt and completion of messages": ({"prompt": [USER, SAID, USER], "completion": [SAID]}, ["yellow"]),
    "numbers": ({"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": 42}]}, ["42"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_conversations_as_others_keep_them(tmp_path: Path, name: str) -> None:
    given, answers = MESSAGES[name]
    tokenizer = chat()
    rows = load(write(tmp_path / "a.jsonl", [given]), tokenizer)
    assert spans(rows, 0, tokenizer) == [answer + IM for answer in answers]
    assert ("Be brief." in tokenizer.decode(rows.ids)) == ("system" in given)


def test_names_that_roles_were_read_as_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [USER, {**SAID, "role": "gpt"}]}, {"messages": [USER, SAID]}])
    assert "role 'gpt' read as 'assistant' (1 row)" in load(path, chat()).summary


def test_tools_reach_the_template_and_calls_are_objects(tmp_path: Path) -> None:
    template = "{{ tools|tojson if tools else '' }}" + CHATML.replace(
        "m['content'] +", "m['content'] + (m.tool_calls[0].function|tojson if m.tool_calls else '') +"
    )
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokenizer = chat(template=template)
    given = [{"messages": talk, "tools": tools}, {"messages": talk, "tools": json.dumps(tools)}]
    given.append({"messages": talk, "functions": [tools[0]["function"]]})
    rows = load(write(tmp_path / "a.jsonl", given), tokenizer)
    for number in range(3):
        text = tokenizer.decode(row(rows, number)[0])
        assert text.startswith('[{"type": "function", "function": {"name": "weather", "parameters": {}}}]<|im_start|>')
        assert spans(rows, number, tokenizer) == ['{"name": "weather", "arguments": {"town": "Oslo"}}' + IM]
    assert "not used" not in rows.summary
    plain = load(write(tmp_path / "b.jsonl", [{"messages": [USER, SAID], "tools": tools}]), chat())
    assert "tools given, but the chat template has no place for them (1 row)" in plain.summary


def test_alpaca_rows_with_system_and_history(tmp_path: Path) -> None:
    given = {
        "instruction": "third", "input": "", "output": "3", "system": "Count.",
        "history": [["first", "1"], ["second", "2"]],
    }  # fmt: skip
    tokenizer = bytes_tokenizer(bos=True)
    rows = load(write(tmp_path / "a.jsonl", [given]), tokenizer)
    assert tokenizer.decode(rows.ids) == (
        "<s>Count.\n\n### Instruction:\nfirst\n\n### Response:1</s>\n\n### Instruction:\nsecond\n\n### Response:2</s>"
        "\n\n### Instruction:\nthird\n\n### Response:3</s>"
    )
    assert spans(rows, 0, tokenizer) == ["1</s>", "2</s>", "3</s>"]


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"prompt": "hello", "response": "yellow"}, "prompt_completion"),
        ({"question": "hello", "answer": "yellow"}, "question_answer"),
        ({"query": "hello", "response": "yellow"}, "question_answer"),
        ({"instruction": "hello", "context": "c", "response": "yellow"}, "alpaca"),
        ({"instruction": "hello", "output": "yellow", "text": "x"}, "alpaca"),
    ],
)
def test_other_names_of_columns(tmp_path: Path, given: dict[str, Any], form: str) -> None:
    tokenizer = bytes_tokenizer()
    rows = load(write(tmp_path / "a.jsonl", [given]), tokenizer)
    assert rows.form == form
    assert learnt(rows, 0, tokenizer) == "yellow</s>"


def test_columns_are_named_and_those_not_used_are_told(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    path = write(tmp_path / "a.jsonl", [{"q": "hello", "a": "yellow", "id": 7}, {"q": "1", "a": "2", "source": "x"}])
    rows = load(path, tokenizer, columns=["instruction=q", "output=a"])
    assert (rows.form, learnt(rows, 0, tokenizer)) == ("alpaca", "yellow</s>")
    assert "columns not used: id, source" in rows.summary
    with pytest.raises(UserError, match="line 1: columns: output=b, but the row has only q, a, id"):
        load(path, tokenizer, columns=["instruction=q", "output=b"])


@pytest.mark.parametrize(
    ("template", "said", "words"),
    [
        ("Q: {{ q }}\nA:", " yellow", "Q: hello\nA: yellow</s>"),
        (
            "Q: {{ q }}\n{% generation %}\n{{ output }}!{% endgeneration %}\nbye",
            " yellow!",
            "Q: hello\n yellow!bye</s>",
        ),
    ],
)
def test_a_prompt_template_of_ones_own(tmp_path: Path, template: str, said: str, words: str) -> None:
    file = tmp_path / "p.jinja"
    file.write_text(template + "\n")
    tokenizer = bytes_tokenizer()
    path = write(tmp_path / "a.jsonl", [{"q": "hello", "output": " yellow"}])
    rows = load(path, tokenizer, prompt_template=str(file))
    assert tokenizer.decode(rows.ids) == words
    assert learnt(rows, 0, tokenizer).removesuffix("</s>") == said
    assert "not used" not in rows.summary
    file.write_text("{{ nowhere }}")
    with pytest.raises(
        UserError, match=r"line 1: prompt_template .*p.jinja does not take it \('nowhere' is undefined\)"
    ):
        load(path, tokenizer, prompt_template=str(file))
    file.write_text("a\n{% if %}")
    with pytest.raises(UserError, match=r"prompt_template: .*p.jinja, line 2: is no Jinja template"):
        load(path, tokenizer, prompt_template=str(file))
    with pytest.raises(UserError, match=r"prompt_template: .*none cannot be read \(No such file"):
        load(path, tokenizer, prompt_template=str(tmp_path / "none"))


def test_a_chat_template_of_ones_own_is_kept_with_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "c.jinja"
    file.write_text(CHATML.replace("assistant", "bot"))
    tokenizer = bytes_tokenizer(eos=IM)
    path = write(tmp_path / "a.jsonl", [{"messages": [USER, SAID]}])
    rows = load(path, tokenizer, chat_template=str(file))
    assert spans(rows, 0, tokenizer) == ["yellow" + IM]
    assert tokenizer.chat_template == file.read_text()
    with pytest.raises(UserError, match=r"chat_template .*: has no effect on rows of the form text"):
        load(write(tmp_path / "b.jsonl", [{"text": "x y"}]), tokenizer, chat_template=str(file))


def test_one_of_several_named_chat_templates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [USER, SAID]}])
    tokenizer = bytes_tokenizer(eos=IM)
    tokenizer.chat_template = {"rag": CHATML.replace("user", "x"), "tool_use": CHATML}
    with pytest.raises(UserError, match=r"has several and no default: rag, tool_use; .* --chat_template rag"):
        load(path, tokenizer)
    assert spans(load(path, tokenizer, chat_template="tool_use"), 0, tokenizer) == ["yellow" + IM]
    tokenizer.chat_template = {"default": CHATML, "rag": "x"}
    assert spans(load(path, tokenizer), 0, tokenizer) == ["yellow" + IM]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DPO": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "preference training .DPO.* --columns prompt=prompt,completion=chosen",
    ),
    "DPO of messages": ({"chosen": [USER, SAID], "rejected": [USER, SAID]}, "--columns messages=chosen"),
    "KTO": ({"prompt": "a", "completion": "b", "label": False}, "preference training .KTO"),
    "an unknown role": ({"messages": [USER, {**SAID, "role": "critic"}]}, "message 1 has the role 'critic'"),
    "an image": ({"messages": [USER, {**SAID, "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
    "a weight of a half": ({"messages": [USER, {**SAID, "weight": 0.5}]}, "its 'weight' is 0.5"),
    "NaN": ({"instruction": "a", "output": math.nan}, "line 1: 'output' is nan, which is no text"),
    "infinity": ({"prompt": math.inf, "completion": "b"}, "line 1: 'prompt' is inf, which is no text"),
    "NaN in a turn": ({"messages": [USER, {**SAID, "content": math.nan}]}, "message 1: its content is nan"),
    "half an emoji": ({"instruction": "smile \ud83d", "output": "b"}, "line 1: holds half a character"),
    "half an emoji in a turn": ({"messages": [{**USER, "content": "\ud83d"}, SAID]}, "line 1: holds half a character"),
    "null": ({"prompt": "a", "completion": None}, "'completion' must be text, but is null"),
    "no messages": ({"messages": []}, "line 1: 'messages' is an empty list"),
    "arguments that are no JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "message 1: arguments of 'f': '{' is not JSON",
    ),
    "tools that are no list": ({"messages": [USER, SAID], "tools": {"name": "x"}}, "'tools' must be a list of objects"),
    "no assistant": ({"messages": [USER]}, "none of its 2 rows has an answer token .*roles: user"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_by_name(tmp_path: Path, name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path / "a.jsonl", [given, given]), chat())
    assert "\n" not in str(caught.value)


def test_long_texts_are_split_and_every_token_is_learnt_once(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(bos=True)
    text = " ".join(map(str, range(700)))
    path = write(tmp_path / "a.jsonl", [{"text": text}, {"text": "hello"}])
    rows = load(path, tokenizer, context_length=64)
    assert rows.index.tolist() == [0] * (len(rows) - 1) + [1]
    taught = [token for n in range(len(rows) - 1) for token, learn in zip(*row(rows, n), strict=True) if learn]
    assert tokenizer.decode(taught) == text + "</s>"
    assert rows.lengths.max() == 64
    assert all(row(rows, n)[0][0] == 1 for n in range(len(rows))), "each part begins as a text does"
    assert "cut" not in rows.summary
    assert "1 long text split at context_length 64" in rows.summary
    cut = load(path, tokenizer, context_length=64, text_overflow="cut")
    whole = len(tokenizer(text)["input_ids"]) + 1
    assert (len(cut), cut.n_truncated) == (2, 1)
    assert f"1 row cut at context_length 64 ({whole - 64:,} tokens lost)" in cut.summary
    with pytest.raises(UserError, match="text_overflow split: has no effect on rows of the form prompt_completion"):
        load(write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}]), tokenizer, text_overflow="split")


def test_rows_are_shown_with_what_is_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat()
    talk = [{"role": "user", "content": "hé\x1b[2J"}, SAID]
    rows = load(write(tmp_path / "a.jsonl", [{"messages": talk}] * 3), tokenizer)
    lines = lines_of(rows, tokenizer, 2)
    assert lines[0] == "rows      the first 2, what is learnt in «»"
    assert lines[1] == f"--- row 0: {rows.lengths[0]} tokens, {rows.trains[: rows.offsets[1]].sum()} of them learnt"
    assert lines[2] == "<|im_start|>user\nhé\\x1b[2J<|im_end|>\n<|im_start|>assistant\n«yellow<|im_end|>»\n"
    assert len(lines) == 6
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b[1;32myellow<|im_end|>\x1b[0m" in lines_of(rows, tokenizer, 1)[2]


def test_columns_may_be_named_for_every_field_of_a_form():
    fields = [name for form in FORMS for name in {**form.needs, **form.takes}]
    assert list(FIELDS) == list(dict.fromkeys(fields))
