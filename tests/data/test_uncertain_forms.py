"""Rows whose columns leave open what is learnt: refused until an option says it, wherever in the file they are."""

from pathlib import Path
from typing import Any

import pytest
from test_data import learnt, load, write

from fsdp_qlora.data.forms import FORMS
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import CHATML, bytes_tokenizer

READY_MADE = {"instruction": "add", "input": "", "output": "yellow", "prompt": "### add ### yellow"}
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yellow"}]


def test_a_ready_made_prompt_may_hold_the_answer(tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "a.jsonl", [READY_MADE] * 2), bytes_tokenizer()
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    assert "may be prompt + output (prompt_completion) or instruction + output (alpaca)" in str(caught.value)
    assert str(caught.value).endswith("as --columns instruction=instruction,output=output")
    for said in ({"dataset_format": "alpaca"}, {"columns": ["instruction=instruction", "output=output"]}):
        rows = load(path, tokenizer, **said)
        assert rows.form == "alpaca"
        assert learnt(rows, 0, tokenizer) == "yellow</s>"
        assert "### add" not in tokenizer.decode(rows.ids)
    assert load(path, tokenizer, dataset_format="prompt_completion").form == "prompt_completion"


@pytest.mark.parametrize("form", [form.name for form in FORMS if len(list(form.needs.values())[-1]) > 1])
def test_one_of_two_answers_is_named_by_the_user(tmp_path: Path, form: str) -> None:
    needs = next(f.needs for f in FORMS if f.name == form)
    field, (first, second, *_) = list(needs.items())[-1]
    said: Any = TALK if form == "messages" else "yellow"
    plain = {column[0]: "hello" for column in needs.values()} | {first: said}
    path = write(tmp_path / "a.jsonl", [plain, {**plain, second: said}])
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    with pytest.raises(
        UserError, match=f"line 2: what is to be learnt may be in {first} or {second}; .* {field}={first}"
    ):
        load(path, tokenizer)
    assert "1 bad row left out (line 2: what is" in load(path, tokenizer, bad_rows="skip").summary
    rows = load(path, tokenizer, columns=[f"{field}={first}"])
    assert learnt(rows, 1, tokenizer) == "yellow<|im_end|>"
    null = load(write(tmp_path / "b.jsonl", [{**plain, second: None}] * 2), tokenizer)
    assert len(null) == 2, "a column that is null is no answer"


PREFERENCE: dict[str, tuple[dict[str, Any], str]] = {
    "a pair": ({"chosen": "x", "rejected": "y"}, "has pairs of chosen and rejected answers"),
    "a label": ({"label": False}, "has the column label of true and false, unlike the first row"),
    "a label in words": ({"kto_tag": "False"}, "has the column kto_tag of true and false"),
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_behind_other_rows_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    more, words = PREFERENCE[name]
    row = {"prompt": "hello", "completion": "yellow"}
    path = write(tmp_path / "a.jsonl", [row, row, {**row, **more}])
    with pytest.raises(UserError, match=f"line 3: {words}"):
        load(path, bytes_tokenizer())
    assert len(load(path, bytes_tokenizer(), dataset_format="prompt_completion")) == 3


def test_a_label_in_csv_is_a_verdict_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,label\na,b,True\na,c,False\n")
    with pytest.raises(UserError, match="its label column says which answers are wanted"):
        load(str(tmp_path / "a.csv"), bytes_tokenizer())


def test_one_row_alone_in_its_file_is_a_row(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    with pytest.raises(UserError, match=r"preference training .* --columns messages=chosen"):
        load(write(tmp_path / "a.jsonl", [{"chosen": TALK, "rejected": TALK}]), tokenizer)
    rows = load(write(tmp_path / "b.jsonl", [{"turns": TALK}]), tokenizer, columns=["messages=turns"])
    assert learnt(rows, 0, tokenizer) == "yellow<|im_end|>"


def test_a_pair_of_single_turns_gets_no_advice_that_cannot_work(tmp_path: Path) -> None:
    row = {"conversations": TALK[:1], "chosen": TALK[1], "rejected": TALK[1]}
    with pytest.raises(UserError, match="to learn the chosen ones alone, put each behind its messages"):
        load(write(tmp_path / "a.jsonl", [row] * 2), bytes_tokenizer())
