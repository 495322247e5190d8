"""Labels of conversations, right to the token, for the habits of chat templates; each template is written here."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_chat import load, spans

from fsdp_qlora.data.chat import ChatTemplate
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import CHATML, bytes_tokenizer

IM = "<|im_end|>"
S = {"role": "system", "content": "Be brief."}
U1, A1 = {"role": "user", "content": "hello yellow"}, {"role": "assistant", "content": "mellow user"}
U2, A2 = {"role": "user", "content": "say it"}, {"role": "assistant", "content": "fellow"}
TWO = [U1, A1, U2, A2]

# Mistral 7B v0.3: system text only where the user's turn is the last message. Nemo: in the last user's turn.
LOOP_LAST = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if m.role == 'user' %}"
    "{% if loop.last and sys is defined %}{{ '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
)
LAST_USER = LOOP_LAST.replace("loop.last and", "turns | selectattr('role', 'equalto', 'user') | list | last == m and")
LLAMA2_SYS = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set sys = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% endif %}{% if m.role == 'user' %}{{ '<s>[INST] ' + (sys if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a yellow assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The last turn ends with </s>, earlier ones with a token whose beginning is the same but for its last letters.
END_DIFFERS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|end_of_text|>' if loop.last and m.role == 'assistant' else '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Nothing ends an earlier turn; the next header begins at once (GLM).
NO_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
EOS_BETWEEN = (  # EOS between rounds, none at the end
    "{% for m in messages %}{% if m.role == 'user' %}{{ ('' if loop.first else eos_token) + 'USER: ' + m.content }}"
    "{% else %}{{ ' ASSISTANT: ' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>\n' }}{% endfor %}"
THOUGHTS = (  # Qwen 3: the last answer's thought is shown, an empty one where there is none; earlier ones are dropped
    "{% for m in messages %}{% set content = m.content or '' %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + content }}{% else %}{{ content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + c.function|tojson + '\n</tool_call>' }}{% endfor %}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PROMPTED_THOUGHT = THOUGHTS.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools|tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + c.function|tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'bot\n' }}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
MARKS_SHORT = MARKS.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
MARKS_IN_MACRO = (
    "{% macro say(m) %}{% if m.role == 'assistant' %}bot {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}"
)
TRIMS = CHATML.replace("m['content']", "m['content']|trim")
LONGEST = CHATML.replace("m['content'] +", "m['content'] + ('' if m['content']|length < 12 else ' (long)') +")
HARMONY = (  # every turn ends and begins with a token of its own; a tool's answer repeats its name; a thought is opened
    "{{ '<|im_start|>system<|msg|>You are.<|end|>' }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>' + messages[loop.index0 - 1].tool_calls[0].function.name + '<|msg|>' + m.content + '<|end|>' }}"
    "{% elif m.tool_calls %}{{ '<|im_start|>assistant to=' + m.tool_calls[0].function.name + '<|msg|>' }}"
    "{{ m.tool_calls[0].function.arguments|tojson + '<|call|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '<|msg|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
EMPTY_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think></think>' }}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '\n<call=' + c.function.name + '>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
LATER_WITHOUT = (  # thoughts and the place for one are shown behind the last question alone
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '<call=' + c.function.name + '>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
ALWAYS_ASKS = (  # whether or not it is asked to
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
ALWAYS_ASKS_TOKEN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{{ '<|assistant|>\n' }}"
)
CALL_TEXT = {"role": "assistant", "content": "<call>"}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}]}  # fmt: skip
RESULT = {"role": "tool", "content": "rain"}
CALLED = '\n<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>' + IM
THINKS = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nfellow"}

# What docs/rows.md tells: habit -> (template, EOS, conversation, what is learnt of it)
HABITS: dict[str, tuple[str, str, list[dict[str, Any]], list[str]]] = {
    "system first": (CHATML, IM, [S, *TWO], ["mellow user" + IM, "fellow" + IM]),
    "system in the first user turn": (LLAMA2_SYS, "</s>", [S, *TWO], [" mellow user </s>", " fellow </s>"]),
    "system in the last user turn": (LAST_USER, "</s>", [S, *TWO], [" mellow user</s>", " fellow</s>"]),
    "system where the user's turn is last": (LOOP_LAST, "</s>", [S, U1, A1], [" mellow user</s>"]),
    "strict alternation": (LLAMA2_SYS, "</s>", TWO, [" mellow user </s>", " fellow </s>"]),
    "BOS in the template": (LOOP_LAST, "</s>", TWO, [" mellow user</s>", " fellow</s>"]),
    "default system prompt, assistant first": (DEFAULT_SYSTEM, IM, [A1, U2, A2], ["mellow user" + IM, "fellow" + IM]),
    "end tokens differ": (
        END_DIFFERS, "<|end_of_text|>", TWO, ["mellow user<|end_of_turn|>", "fellow<|end_of_text|>"],
    ),
    "no end between turns": (NO_END, "</s>", TWO, ["mellow user", "fellow</s>"]),
    "EOS between rounds only": (EOS_BETWEEN, "</s>", TWO, [" mellow user</s>", " fellow</s>"]),
    "no generation prompt": (NO_PROMPT, "</s>", TWO, [" mellow user" + IM, " fellow" + IM]),
    "thoughts dropped from history": (
        THOUGHTS, IM, [U1, THINKS, U2, THINKS], ["fellow" + IM, "<think>\nwell\n</think>\n\nfellow" + IM],
    ),
    "an empty thought is put in": (THOUGHTS, IM, TWO, ["mellow user" + IM, "<think>\n\n</think>\n\nfellow" + IM]),
    "the prompt opens the thought": (PROMPTED_THOUGHT, IM, [U1, THINKS], ["well\n</think>\n\nfellow" + IM]),
    "thought apart from content": (
        THOUGHTS, IM, [U1, {**A2, "reasoning_content": "well"}], ["<think>\nwell\n</think>\n\nfellow" + IM],
    ),
    "tools": (TOOLS, IM, [U1, CALL, RESULT, A2], [CALLED, "fellow" + IM]),
    "a turn that is only a tool call": (THOUGHTS, IM, [U1, CALL], ["<think>\n\n</think>\n\n" + CALLED]),
    "generation marks": (MARKS, IM, [S, *TWO], ["mellow user" + IM, "fellow" + IM]),
    "marks that stop short of the end token": (MARKS_SHORT, "</s>", TWO, ["mellow user" + IM, "fellow" + IM]),
    "marks in a macro": (MARKS_IN_MACRO, IM, TWO, ["mellow user" + IM, "fellow" + IM]),
    "content is trimmed": (TRIMS, IM, [U1, {**A1, "content": "\n mellow \n"}, U2, A2], ["mellow" + IM, "fellow" + IM]),
    "content is kept as it is": (CHATML, IM, [U1, {**A1, "content": "\n mel \n"}], ["\n mel \n" + IM]),
    "a template that looks at the text": (LONGEST, IM, [U1, A2, U2, A2], ["fellow" + IM, "fellow" + IM]),
    "the question repeats the answer": (CHATML, IM, [{**U1, "content": "fellow fellow" + IM}, A2], ["fellow" + IM]),
    "an end and a beginning between turns": (
        HARMONY, "<|return|>", TWO, ["<|msg|>mellow user<|end|>", "<|msg|>fellow<|return|>"],
    ),
    "a tool's answer repeats the call's name": (
        HARMONY, "<|return|>", [U1, CALL, RESULT, A2],
        [' to=weather<|msg|>{"town": "Oslo"}<|call|>', "<|msg|>fellow<|return|>"],
    ),
    "the prompt opens a thought that is not there": (
        EMPTY_THOUGHT, IM, [U1, CALL, {**U2}, A2], ["\n<call=weather>" + IM, "fellow" + IM],
    ),
    "a call loses its thought later": (
        LATER_WITHOUT, IM, [U1, CALL, RESULT, A1, U2, A2],
        ["<call=weather>" + IM, "mellow user" + IM, "\n</think>\n\nfellow" + IM],
    ),
    "a header is put at the end unasked": (ALWAYS_ASKS, IM, TWO, ["mellow user" + IM, "fellow" + IM]),
    "a header is put at the end unasked, EOS being another": (
        ALWAYS_ASKS, "</s>", [U1, CALL_TEXT, U2, A2], ["<call>" + IM, "fellow" + IM],
    ),
    "a header of one token is put at the end unasked": (
        ALWAYS_ASKS_TOKEN, "</s>", TWO, ["mellow user<|end|>", "fellow<|end|>"],
    ),
    "two answers in a row": (CHATML, IM, [U1, A1, A2], ["mellow user" + IM, "fellow" + IM]),
}  # fmt: skip


def tokenizer_for(template: str, eos: str) -> Any:
    tokenizer = bytes_tokenizer(bos=True, eos=eos if eos in ("</s>", IM) else "</s>", chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": [
        "<|im_start|>", IM, "<|end_of_turn|>", "<|end_of_text|>", "<|user|>", "<|assistant|>", "<|system|>",
        "<|msg|>", "<|end|>", "<|call|>", "<|return|>"]})  # fmt: skip
    tokenizer.eos_token = eos
    return tokenizer


@pytest.mark.parametrize("habit", HABITS)
def test_labels_are_right_to_the_token(tmp_path: Path, habit: str) -> None:
    template, eos, talk, answers = HABITS[habit]
    tokenizer = tokenizer_for(template, eos)
    rows = load(tmp_path, [talk], tokenizer)
    assert spans(rows, 0, tokenizer) == answers
    whole = tokenizer.apply_chat_template(talk, tokenize=False).rstrip()
    text = tokenizer.decode(rows.ids).rstrip()
    if "call" not in habit and habit not in (
        "tools",
        "the prompt opens a thought that is not there",
    ):  # there arguments given as text become an object
        assert text in (whole, whole + eos), "the one rendering is what is trained"


@pytest.mark.parametrize("habit", HABITS)
def test_the_table_in_the_docs_names_every_habit(habit: str) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "rows.md").read_text()
    assert f"| {habit} |" in page


@pytest.mark.parametrize("habit", HABITS)
def test_nothing_outside_the_assistants_words_is_learnt_whatever_they_are(tmp_path: Path, habit: str) -> None:
    """With other words in the other turns, the same is learnt."""
    template, eos, talk, answers = HABITS[habit]
    others = ["a", "<think>b</think>c", "x\n\ny  ", 'say "it" {}', "[/INST] assistant\n", "<|im_start|>assistant\n"]
    told = []
    for words in others:
        changed = [{**m, "content": words} if m["role"] in ("user", "system") else m for m in talk]
        told.append(changed)
    tokenizer = tokenizer_for(template, eos)
    rows = load(tmp_path, told, tokenizer)
    for number in range(len(others)):
        assert spans(rows, number, tokenizer) == answers, others[number]


REFUSED = {
    "an answer that the template leaves out": ("{{ messages[0].content }}", [U1, A1], "message 1 is not in what it"),
    "an answer that is written twice": (
        "{% for m in messages %}{{ m.content + ' ' + m.content }}{% endfor %}", [U1, A1], "scattered .* or repeated",
    ),
    "an answer in capitals": (
        "{% for m in messages %}{{ m.content|upper }}{% endfor %}", [U1, A1], "message 1 is not in what it renders",
    ),
    "a tool call that the template leaves out": (CHATML, [U1, {**CALL, "content": "x"}], "leaves out a tool call"),
    "one of two calls of one name that the template leaves out": (
        HARMONY, [U1, {**CALL, "tool_calls": CALL["tool_calls"] * 2}], "leaves out a tool call of message 1",
    ),
    "an end that may be a beginning": (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' and messages|length == 1 %}"
        "{{ raise_exception('no') }}{% endif %}{{ '<|im_end|>' if loop.last else '<|im_start|>' }}{% endfor %}",
        TWO, "is followed by '<|im_start|>', which may or may not be its end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_certain_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    template, talk, message = REFUSED[case]
    message = message.replace("|", r"\|")
    with pytest.raises(UserError, match=rf"line 1: the model's chat template does not take .*{message}"):
        load(tmp_path, [talk, talk], tokenizer_for(template, "</s>"))


def test_a_row_that_is_refused_is_left_out_and_counted_if_asked(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(LLAMA2_SYS, "</s>")
    rows = load(tmp_path, [TWO, TWO[1:], TWO], tokenizer, bad_rows="skip")
    assert rows.index.tolist() == [0, 2]
    assert "1 bad row left out (line 2: " in rows.summary
    assert "line 2: the model's chat template does not take these messages (must alternate)" in rows.summary


def test_a_system_text_that_the_template_leaves_out_is_told(tmp_path: Path) -> None:
    rows = load(tmp_path, [[S, U1, A1], [U1, A1]], tokenizer_for(LOOP_LAST, "</s>"))
    assert "text of a system turn, which the chat template leaves out (1 row)" in rows.summary
    assert "leaves out" not in load(tmp_path, [[S, U1, A1]], tokenizer_for(CHATML, IM)).summary


def test_words_beside_a_call_that_the_template_leaves_out_are_told(tmp_path: Path) -> None:
    talk = [U1, {**CALL, "content": "hello"}, RESULT, A2]
    rows = load(tmp_path, [talk], tokenizer_for(HARMONY, "<|return|>"))
    assert "a part of the text of an assistant turn, which the chat template leaves out (1 row)" in rows.summary


def test_settings_of_the_template_decide_where_the_answer_begins(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(THOUGHTS, IM)
    path = tmp_path / "a.jsonl"
    row = {"messages": [U1, A2], "chat_template_kwargs": {"enable_thinking": False}}
    path.write_text(json.dumps(row) + "\n" + json.dumps({"messages": [U1, A2]}))
    from fsdp_qlora.config.options import DataOptions
    from fsdp_qlora.data.batches import load_rows

    rows = load_rows(DataOptions(dataset=str(path)), tokenizer, 50_000)
    assert spans(rows, 0, tokenizer) == ["fellow" + IM]
    assert spans(rows, 1, tokenizer) == ["<think>\n\n</think>\n\nfellow" + IM]


def test_conversations_of_one_shape_are_rendered_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_for(CHATML, IM)
    calls: list[int] = []
    real = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **given: calls.append(1) or real(*args, **given)
    )
    talks = [[{**U1, "content": f"hello {i}"}, {**A1, "content": f"yellow {i}"}] * 3 for i in range(200)]
    rows = load(tmp_path, talks, tokenizer)
    assert len(rows) == 200
    assert len(calls) < 230


def test_turns_without_words_are_rendered_a_few_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each turn of the conversation: 100 of 600 took minutes."""
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = CHATML
    turns = 30
    said = [("assistant", "" if i % 4 == 1 else "done") if i % 2 else ("user", f"step {i}") for i in range(2 * turns)]
    rendered, render = [], ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *args, **more: rendered.append(1) or render(*args, **more))
    template = ChatTemplate(tokenizer, "d", False)
    template({"messages": [{"role": role, "content": content} for role, content in said]}, "line 1")
    assert turns < len(rendered) < 4 * turns
