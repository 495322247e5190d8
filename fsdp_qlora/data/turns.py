"""The assistant's turns in a rendered conversation: where each begins and ends, proved, or refused.

A turn begins where generation would begin: behind the header that asks for an answer. It ends with the special token
that ends it (`<|im_end|>`, `</s>`), which is what generation stops at. Both lie in the template's own text around the
turn's words, which `stand_ins` tells apart from all words; they are found in it by rendering the same conversation
cut before and after the turn.
"""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fsdp_qlora.data.messages import ASSISTANT, THOUGHTS, Message, Talk
from fsdp_qlora.data.stand_ins import NONCE, Spot, Word, explain, replace_words, take_apart
from fsdp_qlora.data.turn_edges import Render, Template, Unclear

Span = tuple[int, int]
PLANS = 4096  # conversations of one shape need to be asked about once; so many shapes are kept


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


def words_left_out(talk: Talk, words: list[Word], shown: Collection[int]) -> dict[int, bool]:
    """Return {message of which a word is not rendered: whether none is}. shown: the numbers of stand-ins that are.

    Raises Unclear for a tool call to learn: the turn would be learnt without it."""
    numbers = set(shown)  # two calls of a turn may have one name
    left_out = [word for number, word in enumerate(words) if number not in numbers]
    dropped = next((word.message for word in left_out if word.is_call and talk.learn[word.message]), None)
    if dropped is not None:
        raise Unclear(f"it leaves out a tool call of message {dropped}")
    there = {words[number].message for number in numbers}
    return {word.message: word.message not in there for word in left_out}


class TurnFinder:
    """Finds the turns of conversations of one chat template."""

    def __init__(self, render: Render, specials: set[str], eos: str, tags: set[str]):
        self.render, self.eos, self.tags = render, eos, tags
        self.template = Template(render, specials, eos)
        self.special = self.template.special
        self.plans: dict[str, Plan] = {}

    def find(self, talk: Talk, whole: str) -> tuple[list[tuple[int, Span]], dict[int, bool]]:
        """Return ([(message, [start, end) in `whole`)] of the turns to learn, {message that is not rendered: whether
        nothing of it is}).

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
            missing: dict[int, bool] = {}
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
    ) -> tuple[dict[int, Span], dict[int, bool]] | None:
        """Return spans by message, and which messages are left out as `find` does; None where stand-ins do not explain
        the rendering."""
        made, words = replace_words(talk.messages, which, self.tags)
        if not words and not any(talk.learn):
            return {}, {}
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
        return spans, words_left_out(talk, words, [spot.number for spot in spots])

    def _span(self, edge: Edge, spots: list[Spot], between: list[str]) -> Span:
        behind = spots[-1].end if spots else 0  # no word at all: what is learnt is the end of an empty answer
        first = spots[edge.first].start if edge.first < len(spots) else behind + len(between[-1])
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
        own = self._own(talk, made, plan, places, number)
        shown = [plan.numbers[spot] for spot in own]
        if not own:
            if any(word.message == number and not word.is_call for word in words):
                raise Unclear(f"message {number} is not in what it renders")
            if any(str(made[number].get(key) or "").strip() for key in (*THOUGHTS, "content")):
                raise Unclear(f"message {number} holds nothing but tags, which the template may take for its own")
            return self._wordless(talk, made, plan, number)
        repeated = [n for n in shown if shown.count(n) > 1] + [plan.numbers[spot] for spot in places[len(own) :]]
        if own != list(range(own[0], own[-1] + 1)) or not all(words[n].is_call for n in repeated):
            raise Unclear(f"message {number} is scattered over what it renders, or repeated in it")
        before, after = plan.between[own[0]], plan.between[own[-1] + 1]
        previous = plan.numbers[own[0] - 1] if own[0] else None
        template = self.template
        start = template.start(before, template.tail(made[:number], True, talk, previous), talk)
        if start is None and words[shown[0]].is_call:
            start = template.start_of_call(before, made, number, talk, previous)
        if start is None:  # the first word itself; its token holds the space before it, where no header ends there
            lead = self._lead(made[number], shown[0])
            start = len(before.removesuffix(lead)) if lead.strip() else len(before)
            start = start if template.header(talk) else len(before[:start].rstrip(" "))
        following = plan.numbers[own[-1] + 1] if own[-1] + 1 < len(plan.numbers) else None
        if number == len(made) - 1:
            continued = template.until_next(made, talk, shown[-1])
            after = after.removesuffix(template.unasked(talk))
            end = template.last_end(before, after, continued, bool(made[number].get("tool_calls")))
        else:
            until = words[following].message + 1 if following is not None else 0
            behind = made[number + 1 : until if until > number + 1 else None]
            roles = dict.fromkeys(str(message["role"]) for message in behind)
            alone = template.tail(made[: number + 1], False, talk, shown[-1])
            alone = alone.removesuffix(template.unasked(talk)) if alone is not None else None
            end = template.end(after, alone, roles, number, talk)
        return Edge(own[0], own[-1], start, end)

    def _lead(self, message: Message, number: int) -> str:
        """Return what stands before stand-in `number` in the message's own text: a tag that templates know, space."""
        texts = [str(message.get(key) or "") for key in (*THOUGHTS, "content")]
        leads = [text.partition(f"{NONCE}{number}k")[0] for text in texts if f"{NONCE}{number}k" in text]
        return next((lead.lstrip() for lead in leads if NONCE not in lead), "")

    def _own(self, talk: Talk, made: list[Message], plan: Plan, places: list[int], number: int) -> list[int]:
        """Return the places of a turn's words in the turn itself: a tool's answer may repeat the name of a call.

        They are as many as where the turn is the last."""
        if number == len(made) - 1 or not made[number].get("tool_calls"):
            return places
        try:
            left = Counter(take_apart(self.render(made[: number + 1], False, talk))[1])
        except Exception:
            return places
        own = []
        for i in places:
            left[plan.numbers[i]] -= 1
            if left[plan.numbers[i]] < 0:
                break
            own.append(i)
        return own

    def _wordless(self, talk: Talk, made: list[Message], plan: Plan, number: int) -> Edge | None:
        """Return the span of a turn without a word: its end alone is learnt, if that is found for certain."""
        template = self.template
        before, after = template.last(made[:number], True, talk), template.last(made[: number + 1], False, talk)
        if before is None or after is None or before[0] != after[0]:
            return None
        previous, asked, said = before[0], before[1], after[1]
        if not asked or not said.startswith(asked):
            return None
        continued = template.until_next(made[: number + 1], talk, previous)
        continued = continued[len(asked) :] if continued is not None and continued.startswith(asked) else None
        rest = said[len(asked) :]
        ends = template.end_of_nothing(asked, rest, continued, talk)
        for spot, text in enumerate(plan.between):
            if ends and (plan.numbers[spot - 1] if spot else None) == previous and text.startswith(said):
                return Edge(spot, spot - 1, len(asked), len(asked) + ends)
        return None

    def _by_content(self, talk: Talk, whole: str, number: int) -> tuple[dict[int, Span], dict[int, bool]]:
        """Return the span of the turn's words, where they are in the rendering once, and not without that turn."""
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
            end += self.template.last_end("", rest, None)
        elif closing is not None and closing[0] == self.eos:
            end += closing.end()
        else:
            raise Unclear(f"message {number} does not end with a token that is known to end a turn")
        return {number: (whole.index(content), end)}, {}
