"""Prompts of rows: the ids that training's rows begin with, the answer apart, lines of text, stop tokens."""

import json
from pathlib import Path

import pytest

from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data.asked import Prompt, read_prompts
from fsdp_qlora.data.batches import load_rows
from fsdp_qlora.errors import BadRow, UserError
from tests.support.small_tokenizers import CHATML, PHI3, bytes_tokenizer

TALK = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
ANSWER = {"role": "assistant", "content": "yellow"}
ROWS = {
    "messages": {"messages": [*TALK, ANSWER]},
    "two-turns": {"messages": [*TALK, ANSWER | {"content": "a"}, TALK[1], ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yellow"}]},
    "prompt": {"prompt": "hello:", "completion": "yellow"},
    "alpaca": {"instruction": "say", "input": "hello", "output": "yellow"},
    "history": {"instruction": "say", "history": [["one", "two"]], "output": "yellow"},
    "question": {"question": "hello?", "context": "mellow", "answer": "yellow"},
}  # fmt: skip


def saved(folder: Path, *rows: object) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def tokenizer(template: str = CHATML, eos: str = "</s>"):
    made = bytes_tokenizer(bos=True, eos=eos, chat_template=template)
    made.pad_token = "<unk>"
    return made


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_is_what_a_row_of_training_begins_with(name, tmp_path):
    options = DataOptions(dataset=saved(tmp_path, ROWS[name]), rows_cache=None)
    (prompt,) = read_prompts(options, tokenizer(), 500).prompts
    whole = load_rows(options, tokenizer(), 500).ids.tolist()
    assert prompt.answer == "yellow"
    assert 2 < len(prompt.ids) < len(whole)
    assert whole[: len(prompt.ids)] == prompt.ids
    assert tokenizer().decode(whole[len(prompt.ids) :]).lstrip().startswith("yellow")


def test_one_of_two_answers_is_named_as_in_training(tmp_path):
    row = {"prompt": "hello:", "response": "mellow", "gold": "yellow"}
    named = DataOptions(dataset=saved(tmp_path, row), columns=["completion=gold"], rows_cache=None)
    (prompt,) = read_prompts(named, tokenizer(), 500).prompts
    assert prompt.answer == "yellow"
    assert load_rows(named, tokenizer(), 500).ids[: len(prompt.ids)].tolist() == prompt.ids
    open_ = DataOptions(dataset=saved(tmp_path, {**row, "answer": "yellow"}))
    with pytest.raises(BadRow, match="line 1: what is to be learnt may be in response or answer"):
        read_prompts(open_, tokenizer(), 500)


@pytest.mark.parametrize("name", ["prompt", "alpaca", "question", "messages"])
def test_a_row_without_an_answer_asks_the_same(name, tmp_path):
    row = ROWS[name]
    bare = {k: v for k, v in row.items() if k not in ("completion", "output", "answer")}
    if "messages" in row:
        bare = {"messages": row["messages"][:-1]}
    whole, open_ = (
        read_prompts(DataOptions(dataset=saved(tmp_path, r)), tokenizer(), 500).prompts[0] for r in (row, bare)
    )
    assert whole.ids == open_.ids
    assert open_.answer is None


def test_text_lines_are_a_users_turns_where_there_is_a_chat_template(tmp_path):
    file = tmp_path / "asked.txt"
    file.write_text("hello\n\nyellow hello\n")
    found = read_prompts(DataOptions(dataset=str(file)), tokenizer(), 500)
    assert [p.text for p in found.prompts] == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("hello", "yellow hello")
    ]
    plain = tokenizer()
    plain.chat_template = None
    found = read_prompts(DataOptions(dataset=str(file)), plain, 500)
    assert [p.text for p in found.prompts] == ["hello", "yellow hello"]
    assert all(p.ids[0] == plain.bos_token_id for p in found.prompts)


@pytest.mark.parametrize(("template", "words"), [(CHATML, ["</s>", "<|im_end|>"]), (PHI3, ["</s>", "<|im_end|>"])])
def test_a_chats_turn_ends_where_its_template_ends_one(template, words, tmp_path):
    made = tokenizer(template)
    found = read_prompts(DataOptions(dataset=saved(tmp_path, ROWS["messages"])), made, 500)
    assert found.stops == made.convert_tokens_to_ids(words)


def test_what_asks_nothing_is_refused_with_its_place(tmp_path):
    options = DataOptions(dataset=saved(tmp_path, ROWS["prompt"], {"prompt": "", "completion": "x"}))
    bare = tokenizer()
    with pytest.raises(UserError, match="line 2: asks nothing"):
        read_prompts(options, bare, 500)
    options.bad_rows = "skip"
    found = read_prompts(options, bare, 500)
    assert len(found.prompts) == 1
    assert "1 bad row left out" in found.notes[0]
    options = DataOptions(dataset=saved(tmp_path, {"messages": TALK[:1]}))
    with pytest.raises(UserError, match="no turn that asks"):
        read_prompts(options, bare, 500)
    options = DataOptions(dataset=saved(tmp_path, ROWS["prompt"], {"prompt": "hello"}))

    def refuse(prompt: Prompt) -> None:
        if prompt.answer is None:
            raise BadRow(f"{prompt.location}: has no answer")

    with pytest.raises(UserError, match="line 2: has no answer"):
        read_prompts(options, bare, 500, refuse)
    options.bad_rows = "skip"
    assert len(read_prompts(options, bare, 500, refuse).prompts) == 1
    options = DataOptions(dataset=saved(tmp_path, {"prompt": "hello", "completion": "\ud800"}))
    with pytest.raises(UserError, match="line 1: holds half a character"):
        read_prompts(options, bare, 500)
    with pytest.raises(UserError, match="3 embeddings"):
        read_prompts(DataOptions(dataset=saved(tmp_path, ROWS["prompt"])), bare, 3)
