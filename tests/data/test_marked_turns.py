"""Conversations whose template marks what is generated: each mark with its message, and what is left out told."""

from pathlib import Path
from typing import Any

import pytest
from test_chat import load, spans
from test_turns import A1, A2, CALL, EOS_BETWEEN, IM, MARKS, RESULT, TWO, U1, U2, S, tokenizer_for

from fsdp_qlora.data.chat import ChatTemplate
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import CHATML

# A thought and the words behind the last question are marked apart, earlier answers not at all.
TWO_MARKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ m.role + '\n' }}{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}{% generation %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
    "{% endgeneration %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = MARKS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
THOUGHT = {**A2, "reasoning_content": "hello"}


def test_a_mark_belongs_to_the_message_whose_words_it_holds(tmp_path: Path) -> None:
    """One answer is excluded, and as many are marked as there are answers: but they are another's."""
    tokenizer = tokenizer_for(TWO_MARKS, IM)
    talks = [[U1, {**A1, "weight": 0}, U2, THOUGHT], [U1, A1, U2, {**THOUGHT, "weight": 0}], [U1, A1, U2, THOUGHT]]
    rows = load(tmp_path, talks, tokenizer)
    assert rows.index.tolist() == [0, 2]
    assert spans(rows, 0, tokenizer) == spans(rows, 1, tokenizer) == ["<think>hello</think>fellow" + IM]
    assert "an assistant turn that the chat template does not mark, of which nothing is learnt (2 rows)" in rows.summary


def test_an_excluded_answer_without_words_is_left_to_the_proof(tmp_path: Path) -> None:
    template = MARKS + "{% if add_generation_prompt %}bot\n{% endif %}"
    tokenizer = tokenizer_for(template.replace("bot\n{% endif", "{{ 'bot\n' }}{% endif"), IM)
    rows = load(tmp_path, [[U1, {**A1, "content": "", "weight": 0}, U2, A2]], tokenizer)
    assert spans(rows, 0, tokenizer) == ["fellow" + IM]


def test_a_header_that_nobody_asked_for_ends_no_mark_and_no_answer(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '\n' }}{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    )
    tokenizer = tokenizer_for(template, "</s>")
    assert spans(load(tmp_path, [TWO], tokenizer), 0, tokenizer) == ["mellow user\n", "fellow\n"]
    assert ChatTemplate(tokenizer, "d").end_tokens() == ["</s>"]


TOLD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a system text": ([S, *TWO], "text of a system turn, which the chat template leaves out"),
    "a thought": ([U1, THOUGHT], "a part of the text of an assistant turn, which the chat template leaves out"),
    "an empty answer": ([U1, {**A1, "content": ""}, U2, A2], "an answer without text, of which its end is learnt"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_a_marked_template_leaves_out_is_told(tmp_path: Path, name: str) -> None:
    talk, words = TOLD[name]
    assert f"{words} (1 row)" in load(tmp_path, [talk], tokenizer_for(NO_SYSTEM, IM)).summary


def test_a_call_that_a_marked_template_leaves_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: .*leaves out a tool call of message 1"):
        load(tmp_path, [[U1, {**CALL, "content": "x"}, RESULT, A2]], tokenizer_for(MARKS, IM))


def test_an_excluded_turn_is_not_learnt_with_the_prompt(tmp_path: Path) -> None:
    talk = [U1, {**A1, "weight": 0}, U2, A2]
    with pytest.raises(UserError, match="line 1: message 1 is excluded from the loss, but train_on_prompt true learns"):
        load(tmp_path, [talk], tokenizer_for(CHATML, IM), train_on_prompt=True)


def test_a_whole_row_ends_too(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(EOS_BETWEEN, "</s>")
    rows = load(tmp_path, [TWO, [*TWO, U1]], tokenizer, train_on_prompt=True)
    texts = [tokenizer.decode(rows.ids[rows.offsets[i] : rows.offsets[i + 1]]) for i in range(2)]
    assert texts[0].endswith("ASSISTANT: fellow</s>")
    assert texts[1].endswith("USER: hello yellow")  # nobody has answered
    asks = tokenizer_for(EOS_BETWEEN.partition("{% if add_generation_prompt")[0] + " ASSISTANT:", "</s>")
    rows = load(tmp_path, [TWO], asks, train_on_prompt=True)
    assert not asks.decode(rows.ids).endswith("</s>")  # a header stands there unasked
