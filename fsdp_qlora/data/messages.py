"""Conversations as people keep them, brought to one form: role and content turns, tools, and which turns are learnt."""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.json_files import DECODER
from fsdp_qlora.data.templates import Row, text_of
from fsdp_qlora.errors import BadRow, first_line

Message = dict[str, Any]

ASSISTANT = "assistant"
# What others call a role. One that the chat template itself knows keeps its name, but for the assistant's.
ROLES = {
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard"), ASSISTANT),
    **dict.fromkeys(("user", "human", "prompter", "person"), "user"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), ASSISTANT),
}
CALL_ROLES = ("function_call", "tool_call")  # a turn of the assistant's whose text is a call in JSON
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")  # a turn's thought, apart from its content
SHARES = ("weight", "train", "loss")  # of a turn, whether it is learnt: OpenAI's, axolotl's, ms-swift's
KNOWN_KEYS = {"role", "from", "content", "value", *SHARES, "tool_calls", "function_call"}
PARTS_LEARNT = "train_detail"  # axolotl's, of characters
# What transformers' own call takes; all else goes to the template.
RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {"documents"}


@dataclass
class Talk:
    """One conversation. learn: for each message, whether it is the assistant's and is to be learnt."""

    messages: list[Message]
    learn: list[bool]
    tools: list[dict[str, Any]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # variables for the template (enable_thinking, ...)
    notes: list[str] = field(default_factory=list)
    excluded: list[int] = field(default_factory=list)  # the assistant's messages that the row itself excludes


class TalkReader:
    """Rows -> Talks, for a chat template with this text (which tells the roles that it knows)."""

    def __init__(self, template: str):
        self.template = template

    def read(self, row: Row, location: str) -> Talk:
        """Return the conversation of a row's `messages`, or of `prompt` and `completion` that are lists of messages.

        Raises BadRow for what is no conversation, for roles that nobody knows and for parts that are no text.
        """
        if "completion" in row and "messages" not in row:
            asked, answers = _list(row, "prompt", location), _list(row, "completion", location)
            given = [*asked, *answers]
        else:
            asked, given = [], _list(row, "messages", location)
        talk = Talk([], [])
        system = text_of(row, "system", location, optional=True)
        if system and not self._is_system(given[0]):
            talk.messages.append({"role": "system", "content": system})
            talk.learn.append(False)
        elif system and system != _content(given[0], location, False):
            talk.notes.append("system column not taken, as messages begin with another system text")
        for number, message in enumerate(given):
            where = f"{location}: message {number}"
            self._add(talk, _object(message, location, number), where, number < len(asked))
        talk.tools = _tools(row, location)
        settings = row.get("chat_template_kwargs") or {}
        if not isinstance(settings, dict) or set(settings) & RESERVED:
            raise BadRow(f"{location}: 'chat_template_kwargs' must be an object of the template's variables")
        talk.settings = dict(settings)
        idle = [name for name in settings if name not in self.template]
        talk.notes += [f"{name!r} of chat_template_kwargs, which the chat template does not use" for name in idle]
        if talk.tools and "tools" not in self.template:
            talk.notes.append("tools given, but the chat template has no place for them")
        return talk

    def _is_system(self, message: Any) -> bool:
        role = str(message.get("role", message.get("from"))) if isinstance(message, dict) else ""
        return ROLES.get(role.strip().lower()) == "system"

    def _add(self, talk: Talk, given: Mapping[str, Any], where: str, is_asked: bool) -> None:
        named = given.get("role", given.get("from"))
        if not isinstance(named, str):
            raise BadRow(f"{where} must be an object with 'role' and 'content', but is {dict(given)!r:.80}")
        role = self._role(named, where)
        message: Message = {key: value for key, value in given.items() if key not in KNOWN_KEYS and value is not None}
        message["role"] = role
        if role != named:
            talk.notes.append(f"role {named!r} read as {role!r}")
        content = _content(given, where, role == ASSISTANT)
        calls = _calls(given, where)
        if named.strip().lower() in CALL_ROLES and not calls:
            calls, content = [_call(_json(content, where), where)], ""
        if calls:
            message["tool_calls"] = calls
        message["content"] = content
        for key in sorted(set(message) - {"role", "content", "tool_calls"}):
            if key not in self.template and not (key in THOUGHTS and any(name in self.template for name in THOUGHTS)):
                talk.notes.append(f"{key!r} of messages, which the chat template does not use")
        if role == ASSISTANT and not is_asked and not _is_learnt(given, where):
            talk.excluded.append(len(talk.messages))
        talk.messages.append(message)
        if role != ASSISTANT and not is_asked and any(given.get(key) for key in SHARES):
            talk.notes.append(f"a {role} turn is marked to be learnt, but only the assistant's are")
        talk.learn.append(role == ASSISTANT and not is_asked and len(talk.learn) not in talk.excluded)

    def _role(self, named: str, where: str) -> str:
        plain = named.strip().lower()
        role = ROLES.get(plain, "")
        mentioned = any(f"{quote}{named}{quote}" in self.template for quote in "'\"")
        if role != ASSISTANT and mentioned:
            return named
        if not role:
            raise BadRow(
                f"{where} has the role {named!r}, which neither this program nor the chat template knows; "
                f"roles are {', '.join(ROLES)}"
            )
        return role


def is_wordless(message: Message) -> bool:
    """Return whether a turn says nothing: no text, no thought and no call."""
    texts = [message["content"], *(message.get(name) for name in THOUGHTS)]
    return not message.get("tool_calls") and not any(isinstance(text, str) and text.strip() for text in texts)


def _list(row: Row, key: str, location: str) -> list[Any]:
    value: Any = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):  # as a CSV file holds it
        value = _json(value, f"{location}: {key!r}")
    if not isinstance(value, list):
        found = "missing" if key not in row else "null" if value is None else type(value).__name__
        raise BadRow(f"{location}: {key!r} must be a list of {{role, content}}, but is {found}")
    if not value:
        raise BadRow(f"{location}: {key!r} is an empty list")
    return value


def _object(message: Any, location: str, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(
            f"{location}: message {number} must be an object with 'role' and 'content', but is {message!r:.80}"
        )
    return message


def _content(given: Mapping[str, Any], where: str, is_assistants: bool) -> str:
    """Return a message's text, parts of text joined. It may be absent or null in a turn that calls a tool, then ''.

    An object, as a tool's result is, is its JSON text; not the assistant's, who would learn a spelling of ours."""
    key = "content" if given.get("content") is not None or "value" not in given else "value"
    value: Any = given.get(key)
    if value is None and (given.get("tool_calls") or given.get("function_call")):
        return ""
    if isinstance(value, list):
        return "".join(_part(part, where) for part in value)
    if isinstance(value, dict) and not is_assistants:
        return json.dumps(value, ensure_ascii=False)
    if key not in given:
        raise BadRow(f"{where} must be an object with 'role' and 'content', but is {dict(given)!r:.80}")
    if value is None:
        raise BadRow(f'{where}: its content is null, but it calls no tool; write "" where it says nothing')
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f'{where}: its content is {value}, which is no text; write null or ""')
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"{where}: its content must be text, but is {type(value).__name__}")
    return str(value)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind == "text" and isinstance(text, str):
        return text
    raise BadRow(f"{where}: its content has a part of type {kind!r}; only parts of text can be taken")


def _is_learnt(given: Mapping[str, Any], where: str) -> bool:
    """Return whether a turn is learnt: not if one of `SHARES` is 0 or false. Raises BadRow for a part of a turn."""
    if given.get(PARTS_LEARNT):
        raise BadRow(f"{where}: its {PARTS_LEARNT!r} asks for a part of the turn; turns are learnt whole or not")
    for key in SHARES:
        value = given.get(key)
        if value is None or value in (0, 1):  # False and True are 0 and 1
            if value is not None and not value:
                return False
            continue
        raise BadRow(f"{where}: its {key!r} is {value!r}, but turns are learnt (1, true) or not (0, false)")
    return True


def _calls(given: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    value: Any = given.get("tool_calls")
    if value is None and given.get("function_call") is not None:
        value = [given["function_call"]]
    if isinstance(value, str):
        value = _json(value, where)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow(f"{where}: its 'tool_calls' must be a list, but is {type(value).__name__}")
    return [_call(call, where) for call in value]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a call as chat templates want it: {type, function: {name, arguments}}, the arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where}: a tool call must be an object with 'name' and 'arguments', but is {call!r:.80}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{where}: arguments of {function['name']!r}")
    made = {key: value for key, value in call.items() if key in ("id", "type", "index")}
    return {"type": "function", **made, "function": {"name": function["name"], "arguments": arguments}}


def _tools(row: Row, location: str) -> list[dict[str, Any]] | None:
    """Return the row's tools: a list, or the JSON text of one; OpenAI's older `functions` too."""
    key = "tools" if row.get("tools") else "functions"
    value: Any = row.get(key)
    if isinstance(value, str):
        value = _json(value, f"{location}: {key!r}") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{location}: {key!r} must be a list of objects, or its JSON text, but is {value!r:.80}")
    return [{"type": "function", "function": tool} if key == "functions" else tool for tool in value]


def _json(text: str, where: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: {text!r:.60} is not JSON ({first_line(error)})") from error
