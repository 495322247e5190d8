"""The assistant's turns in a rendered conversation: where each begins and ends, proved, or refused.

A turn begins where generation would begin: behind the header that asks for an answer. It ends with the special token
that ends it (`<|im_end|>`, `</s>`), which is what generation stops at. Both lie in the template's own text around the
turn's words, which `stand_ins` tells apart from all words; they are found in it by rendering the same conversation
cut before and after the turn.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fsdp_qlora.messages import ASSISTANT, Message, Talk
from fsdp_qlora.stand_ins import NONCE, Spot, Word, explain, replace_words, take_apart

Render = Callable[[list[Message], bool, Talk], str]  # (messages, ask for an answer, the talk they are of)
Span = tuple[int, int]
PLANS = 4096  # conversations of one shape need to be asked about once; so many shapes are kept


class Unclear(Exception):
    """Where a turn begins or ends cannot be proved."""


@dataclass(frozen=True)
class Edge:
    """A turn's edges as characters into the template's text before its first and after its last word."""

    first: int  # spot
    last: int
    start: int  # within the text before the first
    end: int  # within the text after the last


@dataclass
class Plan:
    """The template's texts for conversations of one shape, and each turn's edges in them, or why they are unclear."""

    between: list[str]
    numbers: list[int]
    edges: dict[int, Edge | str | None]  # by message; None: nothing of it is rendered


class TurnFinder:
    """Finds the turns of conversations of one chat template."""

    def __init__(self, render: Render, specials: set[str], eos: str, tags: set[str]):
        self.render, self.eos, self.tags = render, eos, tags
        self.specials = specials
        self.special = re.compile("|".join(sorted(map(re.escape, specials), key=len, reverse=True)) or r"(?!)")
        self.plans: dict[str, Plan] = {}
        self.headers: dict[str, str | None] = {}
        self.asked: dict[str, str] = {}

    def find(self, talk: Talk, whole: str) -> tuple[list[tuple[int, Span]], set[int]]:
        """Return ([(message, [start, end) in `whole`)] of the turns to learn, messages of which nothing is rendered).

        Raises Unclear where a turn to learn cannot be found for certain.
        """
        if NONCE in whole:
            raise Unclear(f"it holds the word {NONCE}")
        wanted = [number for number, learn in enumerate(talk.learn) if learn]
        everything = range(len(talk.messages))
        found = self._by_stand_ins(talk, whole, everything, keep=True)
        if found is None:  # a template that looks into a text: leave the others as they are
            found = self._by_stand_ins(talk, whole, wanted)
        if found is None:
            spans: dict[int, Span] = {}
            missing: set[int] = set()
            for number in wanted:
                alone = self._by_stand_ins(talk, whole, [number])
                alone = alone if alone is not None else self._by_content(talk, whole, number)
                spans |= {n: span for n, span in alone[0].items() if n == number}
                missing |= alone[1]
        else:
            spans, missing = found
        ordered = sorted((span, number) for number, span in spans.items() if number in wanted)
        for (before, _), (after, _) in pairwise(ordered):
            if after[0] < before[1]:
                raise Unclear("turns overlap in what it renders")
        return [(number, span) for span, number in ordered], missing

    def _by_stand_ins(
        self, talk: Talk, whole: str, which: Any, keep: bool = False
    ) -> tuple[dict[int, Span], set[int]] | None:
        """Spans by message, and messages left out of the rendering; None where stand-ins do not explain it."""
        made, words = replace_words(talk.messages, which, self.tags)
        if not words and not any(talk.learn):
            return {}, set()
        key = json.dumps([made, talk.tools, talk.settings], default=str) if keep else ""
        plan = self.plans.get(key) if keep else None
        spots = explain(whole, plan.between, plan.numbers, words) if plan else None
        if plan is None or spots is None:  # spots: a template that shows the date renders anew
            plan = self._plan(talk, made, words, which)
            spots = explain(whole, plan.between, plan.numbers, words) if plan else None
            if plan is None or spots is None:
                return None
            if keep and len(self.plans) < PLANS:
                self.plans[key] = plan
        spans = {}
        for number, edge in plan.edges.items():
            if talk.learn[number]:
                if isinstance(edge, str):
                    raise Unclear(edge)
                if edge is not None:
                    spans[number] = self._span(edge, spots, plan.between)
        shown = {spot.word for spot in spots}
        dropped = next((w.message for w in words if w.is_call and talk.learn[w.message] and w not in shown), None)
        if dropped is not None:
            raise Unclear(f"it leaves out a tool call of message {dropped}")
        return spans, {word.message for word in words} - {word.message for word in shown}

    def _span(self, edge: Edge, spots: list[Spot], between: list[str]) -> Span:
        first = spots[edge.first].start if edge.first < len(spots) else spots[-1].end + len(between[-1])
        last = spots[edge.last].end if edge.last >= 0 else 0
        return first - len(between[edge.first]) + edge.start, last + edge.end

    def _plan(self, talk: Talk, made: list[Message], words: list[Word], which: Any) -> Plan | None:
        try:
            between, numbers = take_apart(self.render(made, False, talk))
        except Exception:
            return None
        plan = Plan(between, numbers, {})
        for number, message in enumerate(made):
            if number in which and message["role"] == ASSISTANT:
                try:
                    plan.edges[number] = self._edges(talk, made, words, plan, number)
                except Unclear as unclear:
                    plan.edges[number] = str(unclear)
        return plan

    def _edges(self, talk: Talk, made: list[Message], words: list[Word], plan: Plan, number: int) -> Edge | None:
        places = [spot for spot, stand_in in enumerate(plan.numbers) if words[stand_in].message == number]
        own: list[int] = []  # places of the turn itself: they follow each other
        for spot in places:
            if own and (spot != own[-1] + 1 or plan.numbers[spot] in [plan.numbers[held] for held in own]):
                break
            own.append(spot)
        shown = [plan.numbers[spot] for spot in own]
        again = [plan.numbers[spot] for spot in places[len(own) :]]  # a call's name, where the tool's answer repeats it
        if not own:
            if any(word.message == number and not word.is_call for word in words):
                raise Unclear(f"message {number} is not in what it renders")
            return self._wordless(talk, made, plan, number)
        if any(n not in shown or not words[n].is_call for n in again):
            raise Unclear(f"message {number} is scattered over what it renders, or repeated in it")
        before, after = plan.between[own[0]], plan.between[own[-1] + 1]
        previous = plan.numbers[own[0] - 1] if own[0] else None
        start = self._start(before, self._tail(made[:number], True, talk, previous), talk)
        if start is None and words[shown[0]].is_call:
            start = self._start_of_call(before, made[:number], talk, previous)
        if start is None:  # the first word itself; its token holds the space before it, where no header ends there
            start = len(before) if self._header(talk) else len(before.rstrip(" "))
        following = plan.numbers[own[-1] + 1] if own[-1] + 1 < len(plan.numbers) else None
        if number == len(made) - 1:
            end = self._last_end(after, bool(made[number].get("tool_calls")))
        else:
            next_one = words[following].message if following is not None else number
            role = made[next_one]["role"] if next_one != number else ""
            end = self._end(after, self._tail(made[: number + 1], False, talk, shown[-1]), role, number, talk)
        return Edge(own[0], own[-1], start, end)

    def _wordless(self, talk: Talk, made: list[Message], plan: Plan, number: int) -> Edge | None:
        """A turn without a word, of which the end alone is learnt: if it is found for certain."""
        for spot, text in enumerate(plan.between):
            previous = plan.numbers[spot - 1] if spot else None
            asked = self._tail(made[:number], True, talk, previous)
            said = self._tail(made[: number + 1], False, talk, previous)
            if asked and said and said.startswith(asked) and text.startswith(said):
                ends = [match.end() for match in self.special.finditer(said, len(asked))]
                return Edge(spot, spot - 1, len(asked), ends[-1]) if ends else None
        return None

    def _tail(self, messages: list[Message], answer_next: bool, talk: Talk, behind: int | None) -> str | None:
        """What `messages` alone render behind stand-in `behind` (None: from the beginning); None if that is not last.

        Its text is the template's alone."""
        try:
            between, numbers = take_apart(self.render(messages, answer_next, talk)) if messages else ([""], [])
        except Exception:
            return None
        if not messages:
            return None
        return between[-1] if (numbers[-1] if numbers else None) == behind else None

    def _start(self, before: str, asked: str | None, talk: Talk) -> int | None:
        """Where the turn begins in the text before its first word; None where it is not known to begin before it.

        asked: what the template puts there when it asks for the answer."""
        header = self._header(talk)
        if asked is not None and before.startswith(asked) and self._is_border(before, len(asked)):
            if header or not before[len(asked) :].strip():
                return len(asked)
        elif header and before.count(header) == 1:
            return before.index(header) + len(header)
        return None

    def _start_of_call(self, before: str, earlier: list[Message], talk: Talk, previous: int | None) -> int:
        """Where a turn begins that begins with a tool call: where words would stand in the call's place."""
        stand_in = 10**6
        try:
            said = [*earlier, {"role": ASSISTANT, "content": f"{NONCE}{stand_in}k"}]
            between, numbers = take_apart(self.render(said, False, talk))
        except Exception:
            between, numbers = [], []
        if stand_in in numbers:
            spot = numbers.index(stand_in)
            if (numbers[spot - 1] if spot else None) == previous and before.startswith(between[spot]):
                return len(between[spot])
        raise Unclear("where a tool call begins is not certain")

    def _is_border(self, text: str, at: int) -> bool:
        return not any(match.start() < at < match.end() for match in self.special.finditer(text))

    def _last_end(self, after: str, holds_arguments: bool = False) -> int:
        """End of the last turn: behind the special tokens that follow it, all text up to the first included.

        holds_arguments: `after` begins inside a tool call, whose arguments may hold anything."""
        every = list(self.special.finditer(after))
        if not every:
            return len(after)
        return every[-1].end() if holds_arguments else max(self._run(after, every[0].start()))

    def _run(self, text: str, at: int) -> Iterator[int]:
        """Ends of the special tokens that follow each other from `at` on, with nothing but space between."""
        while True:
            at += len(text[at:]) - len(text[at:].lstrip())
            match = self.special.match(text, at)
            if match is None:
                return
            yield match.end()
            at = match.end()

    def _end(self, after: str, alone: str | None, role: str, number: int, talk: Talk) -> int:
        """End of a turn that others follow, in the text up to the next word.

        alone: what follows it where it is the last. What both have, and the token that ends it here, is its own."""
        same = self._same(after, alone) if alone is not None else 0
        if alone is not None and same == len(alone) and self.special.search(alone):
            return list(self.special.finditer(alone))[-1].end()
        matched = [match.end() for match in self.special.finditer(after[:same])]
        next_one = self.special.match(after, same + len(after[same:]) - len(after[same:].lstrip()))
        if next_one is not None and (alone is None or self.special.search(alone[same:]) or next_one[0] == self.eos):
            ends = self._is_end(next_one[0], after[next_one.start() :], role, talk)
            if ends:
                return next_one.end()
            if ends is None and not matched:
                raise Unclear(f"message {number} is followed by {next_one[0]!r}, which may or may not be its end")
        if matched:
            return matched[-1]
        return same if alone is not None and same == len(alone) else 0

    def _same(self, one: str, other: str) -> int:
        """Length of the common beginning, with no special token cut in two."""
        length = next(
            (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other))
        )
        for text in (one, other):
            for match in self.special.finditer(text):
                if match.start() < length < match.end():
                    length = match.start()
        return length

    def _is_end(self, token: str, rest: str, role: str, talk: Talk) -> bool | None:
        """Whether `token`, at the beginning of `rest`, ends a turn rather than beginning the next, of `role`."""
        if token == self.eos:
            return True
        header = self.special.match(self._header(talk))
        if header is not None and token != header[0] and rest[len(token) :].lstrip().startswith(header[0]):
            return True  # behind it begins what every turn begins with
        if role not in self.headers:
            try:
                between, numbers = take_apart(
                    self.render([{"role": role, "content": f"{NONCE}0k"}], False, Talk([], []))
                )
                self.headers[role] = between[0] if numbers else None
            except Exception:
                self.headers[role] = None
        begins = self.headers[role]
        return not begins.endswith(rest) if begins else None

    def _header(self, talk: Talk) -> str:
        """What the template puts at the end when it asks for an answer, '' where it has no such thing."""
        key = json.dumps(talk.settings, default=str)
        if key not in self.asked:
            question: list[Message] = [{"role": "user", "content": f"{NONCE}0k"}]
            try:
                asked = take_apart(self.render(question, True, talk))[0][-1]
                plain = take_apart(self.render(question, False, talk))[0][-1]
                self.asked[key] = asked[self._same(asked, plain) :]
            except Exception:
                self.asked[key] = ""
        return self.asked[key]

    def _by_content(self, talk: Talk, whole: str, number: int) -> tuple[dict[int, Span], set[int]]:
        """The turn's words themselves, where they are in the rendering once, and not without that turn."""
        content = str(talk.messages[number].get("content") or "").strip()
        made, words = replace_words(talk.messages, [number], set())
        try:
            without = self.render(made, False, talk)
        except Exception:
            without = content
        if not content or whole.count(content) != 1 or content in without or len(take_apart(without)[1]) != len(words):
            raise Unclear(f"message {number} is not in what it renders, or not to be told from the rest for certain")
        end = whole.index(content) + len(content)
        rest = whole[end:]
        closing = self.special.match(rest, len(rest) - len(rest.lstrip()))
        if number == len(talk.messages) - 1:
            end += self._last_end(rest)
        elif closing is not None and closing[0] == self.eos:
            end += closing.end()
        else:
            raise Unclear(f"message {number} does not end with a token that is known to end a turn")
        return {number: (whole.index(content), end)}, set()
