"""The edges of an assistant's turn in a chat template's own text: where it begins, and which token ends it."""

import json
import re
from collections.abc import Callable, Collection, Iterator

from fsdp_qlora.data.messages import ASSISTANT, Message, Talk
from fsdp_qlora.data.stand_ins import NONCE, take_apart

Render = Callable[[list[Message], bool, Talk], str]  # (messages, ask for an answer, the talk they are of)
PLACE = 10**6  # number of a stand-in that no word has


class Unclear(Exception):
    """A turn whose beginning or end cannot be proved."""


class Template:
    """A chat template by what it renders; all texts here are its own, words being stand-ins."""

    def __init__(self, render: Render, specials: set[str], eos: str):
        self.render, self.eos = render, eos
        self.special = re.compile("|".join(sorted(map(re.escape, specials), key=len, reverse=True)) or r"(?!)")
        self.beginnings: dict[str, str | None] = {}
        self.headers: dict[str, str] = {}
        self.unasked_headers: dict[str, str] = {}

    def tail(self, messages: list[Message], answer_next: bool, talk: Talk, behind: int | None) -> str | None:
        """Return what `messages` render behind stand-in `behind` (None: from the beginning); None if that is not last.

        Its text is the template's alone."""
        last = self.last(messages, answer_next, talk)
        return last[1] if last is not None and last[0] == behind else None

    def last(self, messages: list[Message], answer_next: bool, talk: Talk) -> tuple[int | None, str] | None:
        """Return (the last stand-in of what `messages` render, None for none; the text behind it), None if unknown."""
        if not messages:
            return None
        try:
            between, numbers = take_apart(self.render(messages, answer_next, talk))
        except Exception:
            return None
        return numbers[-1] if numbers else None, between[-1]

    def until_next(self, messages: list[Message], talk: Talk, behind: int | None, role: str = "user") -> str | None:
        """Return the text from stand-in `behind` (None: the beginning) to the next word, if a turn of `role` follows.

        That word may be a system text, which templates put before the last question. None: unknown."""
        following: Message = {"role": role, "content": f"{NONCE}{PLACE}k"}
        try:
            between, numbers = take_apart(self.render([*messages, following], False, talk))
        except Exception:
            return None
        if behind is not None and behind not in numbers:
            return None
        at = len(numbers) - numbers[::-1].index(behind) if behind is not None else 0
        return between[at] if PLACE in numbers[at:] else None

    def start(self, before: str, asked: str | None, talk: Talk) -> int | None:
        """Return where the turn begins in the text before its first word; None if it is not known to begin there.

        asked: what the template puts there when it asks for the answer."""
        header = self.header(talk)
        if asked is not None and before.startswith(asked) and self._is_border(before, len(asked)):
            if header.strip() and header in before[len(asked) :]:  # asked for where another turn goes on
                return before.rindex(header) + len(header)
            if header or not before[len(asked) :].strip():
                return len(asked)
        elif header.strip() and before.count(header) == 1:
            return before.index(header) + len(header)
        return None

    def start_of_call(self, before: str, messages: list[Message], number: int, talk: Talk, previous: int | None) -> int:
        """Return where turn `number` begins, which begins with a tool call: where words would stand in its place.

        Words at the end of the conversation, or with all that follows: templates drop thoughts once it goes on."""
        words: Message = {"role": ASSISTANT, "content": f"{NONCE}{PLACE}k"}
        for later in ([], messages[number + 1 :]):
            try:
                between, numbers = take_apart(self.render([*messages[:number], words, *later], False, talk))
            except Exception:
                continue
            if PLACE in numbers:
                spot = numbers.index(PLACE)
                if (numbers[spot - 1] if spot else None) == previous and before.startswith(between[spot]):
                    return len(between[spot])
        raise Unclear("where a tool call begins is not certain")

    def _is_border(self, text: str, at: int) -> bool:
        return not any(match.start() < at < match.end() for match in self.special.finditer(text))

    def last_end(self, before: str, after: str, continued: str | None, holds_arguments: bool = False) -> int:
        """Return the end of the last turn in the text after its last word, up to the token that ends it included.

        before: the text before its first word. continued: what follows its last word where a question comes next: what
        both have is not of a header. holds_arguments: `after` begins in a tool call, whose arguments may hold anything.
        Raises Unclear for text without a special token that may be a header.
        """
        every = list(self.special.finditer(after))
        if not every:
            if continued is None and after.strip():
                raise Unclear(f"the last turn is followed by {after!r:.40}, which may or may not be its end")
            return len(after) if continued is None or continued.startswith(after) or not after.strip() else 0
        last = every[-1].start() if holds_arguments else every[0].start()
        while holds_arguments and (earlier := next((m for m in every if self._joins(after, m.end(), last)), None)):
            last = earlier.start()
        run = list(self._run(after, last))
        same = len(after) if continued is None else self._same(after, continued)
        ends = self._without_beginnings(after, [end for end in run if end <= same])
        if not ends:
            token = after[last : run[0]]
            if token != self.eos and before.endswith(after[last:]):
                return 0  # a header that is put at the end whether or not an answer is asked for
            ends = run[:1]
        return next((end for end in reversed(run) if end > ends[-1] and after.endswith(self.eos, 0, end)), ends[-1])

    def end_of_nothing(self, asked: str, rest: str, continued: str | None, talk: Talk) -> int:
        """Return the end of a turn without a word in `rest`, what is rendered behind `asked`; 0: not certain.

        No header may come before that end, and nothing behind it but one that is put there unasked."""
        try:
            end = self.last_end(asked, rest, continued, holds_arguments=True)
        except Unclear:
            return 0
        ends = [match for match in self.special.finditer(rest, 0, end) if match.end() == end]
        behind = rest[end:].lstrip()
        if not ends or (behind and not asked.endswith(behind)):
            return 0
        return end if self.header(talk) or not rest[: ends[0].start()].strip() else 0

    def _joins(self, text: str, end: int, start: int) -> bool:
        return end <= start and not text[end:start].strip()

    def _without_beginnings(self, text: str, ends: list[int]) -> list[int]:
        """Return ends of special tokens without those that text follows at once: these begin a header."""
        while ends and text[ends[-1] : ends[-1] + 1].strip() and not text.endswith(self.eos, 0, ends[-1]):
            if self.special.match(text, ends[-1]):
                break
            ends = ends[:-1]
        return ends

    def _run(self, text: str, at: int) -> Iterator[int]:
        """Return ends of the special tokens that follow each other from `at` on, with nothing but space between."""
        while True:
            at += len(text[at:]) - len(text[at:].lstrip())
            match = self.special.match(text, at)
            if match is None:
                return
            yield match.end()
            at = match.end()

    def end(self, after: str, alone: str | None, roles: Collection[str], number: int, talk: Talk) -> int:
        """Return the end of a turn that others follow, in the text up to the next word.

        alone: what follows it where it is the last. What both have, and the token that ends it here, is its own.
        roles: of the turns behind it, through that of the next word."""
        same = self._same(after, alone) if alone is not None else 0
        if alone is not None and same == len(alone) and self.special.search(alone):
            return list(self.special.finditer(alone))[-1].end()
        matched = self._without_beginnings(after, [match.end() for match in self.special.finditer(after[:same])])
        next_one = self.special.match(after, same + len(after[same:]) - len(after[same:].lstrip()))
        if next_one is not None and (alone is None or self.special.search(alone[same:]) or next_one[0] == self.eos):
            ends = self._is_end(next_one[0], after[next_one.start() :], roles, talk)
            if ends:
                return next_one.end()
            if ends is None and not matched:
                raise Unclear(f"message {number} is followed by {next_one[0]!r}, which may or may not be its end")
        if matched:
            return matched[-1]
        return same if alone is not None and same == len(alone) else 0

    def unasked(self, talk: Talk) -> str:
        """Return the header that the template puts behind every conversation, asked for or not; '' where it does not.

        It stands behind a question and behind an answer, and is not how the conversation goes on behind that."""
        if self.header(talk):
            return ""
        key = json.dumps(talk.settings, default=str)
        if key not in self.unasked_headers:
            self.unasked_headers[key] = self._find_unasked(talk)
        return self.unasked_headers[key]

    def _find_unasked(self, talk: Talk) -> str:
        question: Message = {"role": "user", "content": f"{NONCE}0k"}
        answer: Message = {"role": ASSISTANT, "content": f"{NONCE}1k"}
        asked = self.last([question], False, talk)
        said = self.last([question, answer], False, talk)
        answered = self.until_next([question], talk, 0, ASSISTANT)
        continued = self.until_next([question, answer], talk, 1)
        if asked is None or said is None or answered is None or continued is None:
            return ""
        if not answered.startswith(asked[1]) or continued.startswith(said[1]):
            return ""
        matches = self.special.finditer(said[1][: self._same(said[1], continued)])
        own = self._without_beginnings(said[1], [match.end() for match in matches])
        header = said[1][own[-1] if own else 0 :]
        both = next((header[at:] for at in range(len(header)) if asked[1].endswith(header[at:])), "")
        return both if both.replace(self.eos, "").strip() else ""

    def _same(self, one: str, other: str) -> int:
        """Return the length of the common beginning, with no special token cut in two."""
        length = next(
            (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other))
        )
        for text in (one, other):
            for match in self.special.finditer(text):
                if match.start() < length < match.end():
                    length = match.start()
        return length

    def _is_end(self, token: str, rest: str, roles: Collection[str], talk: Talk) -> bool | None:
        """Return whether `token`, at the beginning of `rest`, ends a turn rather than beginning one of `roles`.

        rest: the text up to the next word; several turns without a word may begin in it. None: unknown."""
        if token == self.eos:
            return True
        header = self.special.match(self.header(talk))
        if header is not None and token != header[0] and rest[len(token) :].lstrip().startswith(header[0]):
            return True  # behind it begins what every turn begins with
        begins = [self._beginning(role) for role in roles]
        known = [*begins, *([self.header(talk)] if ASSISTANT in roles else [])]
        if any(text and (text.endswith(rest) or self._opens(text, token, rest)) for text in known):
            return False
        return True if begins and all(begins) else None

    def _opens(self, begins: str, token: str, rest: str) -> bool:
        """Return whether `rest` begins as what a turn begins with does from its last `token` on.

        Either may be longer: by another turn without a word, or by a thought that only the last turn shows."""
        opening = begins[begins.rindex(token) :] if token in begins else ""
        return bool(opening) and (rest.startswith(opening) or opening.startswith(rest))

    def _beginning(self, role: str) -> str | None:
        """Return what a conversation of one turn begins with, up to its word; None where it has none."""
        if role not in self.beginnings:
            try:
                between, numbers = take_apart(
                    self.render([{"role": role, "content": f"{NONCE}0k"}], False, Talk([], []))
                )
                self.beginnings[role] = between[0] if numbers else None
            except Exception:
                self.beginnings[role] = None
        return self.beginnings[role]

    def header(self, talk: Talk) -> str:
        """Return what the template puts at the end to ask for an answer, '' where it has no such thing."""
        key = json.dumps(talk.settings, default=str)
        if key not in self.headers:
            question: list[Message] = [{"role": "user", "content": f"{NONCE}0k"}]
            try:
                asked = take_apart(self.render(question, True, talk))[0][-1]
                plain = take_apart(self.render(question, False, talk))[0][-1]
                self.headers[key] = asked[self._same(asked, plain) :]
            except Exception:
                self.headers[key] = ""
        return self.headers[key]
