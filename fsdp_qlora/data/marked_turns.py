"""The assistant's turns by a chat template's own marks, each with the message that it is of."""

import json
from collections.abc import Callable, Collection
from itertools import pairwise

from fsdp_qlora.data.marks import CLOSES, MARK, MARKING, OPENS, as_calls, read_marks
from fsdp_qlora.data.messages import ASSISTANT, Message, Talk, is_wordless
from fsdp_qlora.data.stand_ins import explain, replace_words, take_apart
from fsdp_qlora.data.turns import PLANS, Span, words_left_out

Render = Callable[[list[Message], bool, Talk, str], str]  # (messages, ask for an answer, the talk, the template)
FIRST: tuple[int | None, Span] = (None, (0, 0))  # before all marks
UNMARKED = "an assistant turn that the chat template does not mark, of which nothing is learnt"


class MarkedTurns:
    """Finds what a chat template with `{% generation %}` marks holds in them."""

    def __init__(
        self,
        render: Render,
        template: str,
        tags: Collection[str],
        specials: tuple[str, ...],
        end_tokens: Callable[[], list[str]],
    ):
        self.render, self.tags, self.specials, self.end_tokens = render, tags, specials, end_tokens
        self.marking = MARKING + as_calls(template)
        self.shapes: dict[str, tuple[list[str], list[int], list[list[int]]]] = {}

    @staticmethod
    def has_marks(template: str) -> bool:
        """Return whether a template marks anything."""
        return any(mark[2] == "generation" for mark in MARK.finditer(template))

    def find(self, talk: Talk, whole: str) -> tuple[list[tuple[int | None, Span]], dict[int, bool]] | None:
        """Return what `TurnFinder.find` does. The message of a mark is None where it is not known.

        None: the template marks nothing here, or some turns are not to be learnt and marks cannot be told apart.
        Raises Unclear for a tool call that the template leaves out."""
        if OPENS in whole or CLOSES in whole:
            return None
        plain, marks = read_marks(self.render(talk.messages, False, talk, self.marking))
        if plain != whole or not marks:
            return None
        owners, missing = self._owners(talk, whole, len(marks))
        found = [(owner, span) for owner, span in zip(owners, marks, strict=True) if span[0] < span[1]]
        answers = [number for number, message in enumerate(talk.messages) if message["role"] == ASSISTANT]
        if all(talk.learn[number] for number in answers):
            found = self._with_empty_ones(talk, found)
        elif any(owner is None for owner, _ in found):
            return None
        if all(owner is not None for owner, _ in found):
            owned = {owner for owner, _ in found}
            silent = [n for n in answers if talk.learn[n] and n not in owned and n not in missing]
            talk.notes += [UNMARKED for n in silent if not is_wordless(talk.messages[n])]
        found = [(owner, (start, self._through_end(whole, end))) for owner, (start, end) in found]
        pairs = pairwise([FIRST, *found])
        cut = [(owner, (max(start, before), end)) for (_, (_, before)), (owner, (start, end)) in pairs]
        learnt = [(owner, span) for owner, span in cut if owner is None or talk.learn[owner]]
        return [(owner, span) for owner, span in learnt if span[0] < span[1]], missing

    def _owners(self, talk: Talk, whole: str, count: int) -> tuple[list[int | None], dict[int, bool]]:
        """Return the message of each mark, and which messages are left out as `TurnFinder.find` does.

        Stand-ins in the place of all words show it, if they explain the rendering; else no message is known."""
        made, words = replace_words(talk.messages, range(len(talk.messages)), self.tags)
        key = json.dumps([made, talk.tools, talk.settings], default=str)
        shape = self.shapes.get(key)
        if shape is None:
            try:
                text, marks = read_marks(self.render(made, False, talk, self.marking))
            except Exception:  # a template that looks into the words
                return [None] * count, {}
            shape = (*take_apart(text), [take_apart(text[start:end])[1] for start, end in marks])
            if len(self.shapes) < PLANS:
                self.shapes[key] = shape
        between, numbers, held = shape
        if len(held) != count or explain(whole, between, numbers, words) is None:
            return [None] * count, {}
        messages = [{words[number].message for number in inside} for inside in held]
        return [owners.pop() if len(owners) == 1 else None for owners in messages], words_left_out(talk, words, numbers)

    def _with_empty_ones(self, talk: Talk, found: list[tuple[int | None, Span]]) -> list[tuple[int | None, Span]]:
        """Return the marks with those that hold no word given to the answers without one, if they are as many."""
        empty = [number for number, learn in enumerate(talk.learn) if learn and is_wordless(talk.messages[number])]
        if len(empty) != sum(owner is None for owner, _ in found):
            return found
        left = iter(empty)
        return [(next(left) if owner is None else owner, span) for owner, span in found]

    def _through_end(self, whole: str, end: int) -> int:
        """Include the token that ends a turn where the template's mark stops short of it.

        The turn would never be learnt to end otherwise."""
        if whole[:end].rstrip().endswith(self.specials):
            return end
        at = end + len(whole[end:]) - len(whole[end:].lstrip())
        return next((at + len(token) for token in self.end_tokens() if whole.startswith(token, at)), end)
