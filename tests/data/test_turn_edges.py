"""Edges of turns that are easily taken for others: headers nobody asked for, turns without words, tags alone."""

from pathlib import Path
from typing import Any

import pytest
from test_chat import load, spans
from test_turns import A1, A2, ALWAYS_ASKS_TOKEN, IM, LAST_USER, NO_PROMPT, TWO, U1, U2, S, tokenizer_for

from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import CHATML

ASKS_IN_WORDS = (  # no special token, and the header of an answer behind every conversation
    "{% for m in messages %}{{ 'AI: ' if m.role == 'assistant' else 'User: ' }}{{ m.content + '\n' }}{% endfor %}AI: "
)
ASKS_BEHIND_SYSTEM = LAST_USER.replace("'[/INST]'", "'[/INST]bot: '").replace(" + eos_token", "") + "bot: "
SPACE_ASKS = (
    "{% for m in messages %}{{ '[INST] ' + m.content if m.role == 'user' else ' ' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
)
PHI = (  # EOS behind the last turn alone, and none of the tokens that end the others
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] }}"
    "{{ '<|im_end|>\n' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
BLANK_ENDS = PHI.replace("'<|im_end|>\n'", "'\n\n'").replace(
    "m.content.split", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content.split"
)
ASKS_AFTER_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ '<think></think>' if m.role == 'assistant' }}"
    "{{ m.content + '\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
PHI_ENDS = ["mellow user" + IM, "fellow" + IM + "\n</s>"]
EMPTY, BLANK = {"role": "assistant", "content": ""}, {"role": "user", "content": ""}
EDGES: dict[str, tuple[str, str, list[dict[str, Any]], list[str]]] = {
    "a header in words, behind the last answer": (ASKS_IN_WORDS, "</s>", TWO, ["mellow user", "fellow"]),
    "the same behind two answers in a row": (ASKS_IN_WORDS, "</s>", [U1, A1, A2], ["mellow user", "fellow"]),
    "the same where the system text moves to the next question": (
        ASKS_BEHIND_SYSTEM, "</s>", [S, U1, A2], ["  fellow"],
    ),
    "a header of tokens behind two answers in a row": (
        ALWAYS_ASKS_TOKEN, "</s>", [U1, A1, A2], ["mellow user<|end|>", "fellow<|end|>"],
    ),
    "a header behind each thought": (ASKS_AFTER_THOUGHT, "</s>", [U1, A2], ["fellow"]),
    "a question without words behind an answer": (PHI, "</s>", [U1, A1, BLANK, A2], PHI_ENDS),
    "a question of a tag alone": (PHI, "</s>", [U1, A1, {**BLANK, "content": "</think>"}, A2], PHI_ENDS),
    "an answer behind an answer, which shows no thought": (
        BLANK_ENDS, "</s>", [U1, A1, A2], ["mellow user", "<think></think>fellow\n\n</s>"],
    ),
    "an empty answer without a header that is known": (NO_PROMPT, IM, [U1, EMPTY, U2, A2], [" fellow" + IM]),
    "an empty answer that ends without a token": (
        BLANK_ENDS.replace("{{ eos_token }}", ""), "</s>", [U1, A1, U2, EMPTY], ["mellow user\n\n"],
    ),
    "no words at all": (CHATML, IM, [BLANK, EMPTY], [IM]),
    "an answer that begins with a tag of the template": (
        ASKS_AFTER_THOUGHT, "</s>", [U1, {**A2, "content": "<think>x</think>fellow"}], ["<think>x</think>fellow"],
    ),
    "a space for a header": (SPACE_ASKS, "</s>", [U1, {**A2, "content": " fellow"}], [" fellow</s>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_no_header_is_learnt_and_no_word_is_not(tmp_path: Path, name: str) -> None:
    template, eos, talk, answers = EDGES[name]
    tokenizer = tokenizer_for(template, eos)
    assert spans(load(tmp_path, [talk], tokenizer), 0, tokenizer) == answers


NO_FOLLOW_UP = (
    "{% if messages|length > 2 %}{{ raise_exception('one round') }}{% endif %}"
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: "
)
UNCERTAIN = {
    "text that may be a header": (NO_FOLLOW_UP, [U1, A1], "which may or may not be its end"),
    "a tag alone": (PHI, [U1, {**A1, "content": "</think>"}, U2, A2], "message 1 holds nothing but tags"),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_may_be_a_header_or_a_tag_is_refused(tmp_path: Path, name: str) -> None:
    template, talk, words = UNCERTAIN[name]
    with pytest.raises(UserError, match=f"line 1: .*{words}"):
        load(tmp_path, [talk], tokenizer_for(template, "</s>"))
