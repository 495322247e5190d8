"""The tokenizer, and pieces of text -> ids and what trains of them: BOS once, EOS learnt, no token over a border."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fsdp_qlora.data.templates import Example
from fsdp_qlora.errors import UserError, first_line

SENTINELS = ("\n", ")")  # put before a text that continues another; the ids they make are taken off again


def load_tokenizer(model_name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder or hub id, with a pad token. Raises UserError if there is none.

    A missing pad token becomes the unknown token, else EOS: no embedding row is added, and which token it is does not
    matter, since padding is masked by its position.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, revision=revision, trust_remote_code=False)
    except Exception as error:  # the hub's client and every tokenizer library raise kinds of their own
        raise UserError(
            f"model_name {model_name!r}: its tokenizer could not be loaded ({first_line(error)}); "
            "are tokenizer.json (or tokenizer.model) and tokenizer_config.json with the model?"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Tokens:
    """One row. ids [S] int32; trains [S] bool: whether the token is learnt (never the first: nothing predicts it)."""

    ids: npt.NDArray[np.int32]
    trains: npt.NDArray[np.bool_]


class Encoder:
    """Examples -> Tokens with one tokenizer, many at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool):
        """Raise UserError if the tokenizer has no EOS token."""
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the model's tokenizer has no EOS token, so answers would never end; set eos_token in its folder"
            )
        self.tokenizer, self.train_on_prompt, self.eos = tokenizer, train_on_prompt, int(tokenizer.eos_token_id)
        self.start = _start_ids(tokenizer)
        # What stands for characters that the vocabulary does not have; None: the tokenizer has bytes for them.
        others = {tokenizer.eos_token_id, tokenizer.bos_token_id, None}
        self.unknown = None if tokenizer.unk_token_id in others else int(tokenizer.unk_token_id)
        # The Rust tokenizer itself: half the time of transformers' call, which makes Python lists of all it knows.
        self.fast: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self.fast is not None:
            self.fast.no_truncation()
            self.fast.no_padding()
        self.sentinels = {sentinel: self._plain([sentinel])[0] for sentinel in SENTINELS}
        self.added = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self.added_words = tuple(sorted(filter(str.strip, self.added.values()), key=len, reverse=True))
        self.lead_ids: dict[str, list[int]] = {}
        # SentencePiece tokenizers put a space before whatever they are given. An answer that follows a prompt has none.
        self.adds_space = self._plain(["x"])[0] != self._plain(["\nx"])[0][len(self.sentinels["\n"]) :]

    def has_unknown(self, example: Example, row: Tokens) -> bool:
        """Return whether a row's tokens stand for characters that the tokenizer does not know."""
        if self.unknown is None or not (row.ids == self.unknown).any():
            return False
        return not any(str(self.tokenizer.unk_token) in piece.text for piece in example.pieces)

    def encode(self, examples: Sequence[Example]) -> list[Tokens]:
        """Tokenize complete examples as one text, whose characters tell what of it is learnt.

        Pieces of the others are tokenized apart, so that the ids of a prompt alone begin the ids of its row."""
        done: list[Tokens | None] = [None] * len(examples)
        if self.fast is not None:
            whole = [number for number, example in enumerate(examples) if example.complete and example.pieces]
            texts = ["".join(piece.text for piece in examples[number].pieces) for number in whole]
            encodings = self.fast.encode_batch(texts, add_special_tokens=False) if texts else []
            for number, text, encoding in zip(whole, texts, encodings, strict=True):
                done[number] = self._by_characters(examples[number], text, encoding)
        rest = iter(self._by_pieces([example for example, row in zip(examples, done, strict=True) if row is None]))
        return [row if row is not None else next(rest) for row in done]

    def prompt(self, example: Example) -> list[int]:
        """Return the ids of a text that is to be continued: as those that `encode` begins with, and no EOS behind."""
        texts = [piece.text for piece in example.pieces]
        parts = [*self._plain(texts[:1]), *self._continued(texts[1:])]
        ids = [i for piece, part in zip(example.pieces, parts, strict=True) for i in self._ended(piece.ends, part)]
        return ids if example.complete or ids[: len(self.start)] == self.start else self.start + ids

    def continuation(self, text: str, chat: str = "") -> list[int]:
        """Return the ids of a text that follows another one, as `encode` has an answer's. chat: the prompt of one."""
        return self._continued([text], [self._lead(chat)])[0]

    def _by_characters(self, example: Example, text: str, encoding: Any) -> Tokens | None:
        """Return the row's tokens; None where one lies across a border between pieces.

        An added token that swallows the space behind it, as Phi-3's do, ends at its own end: that space has none."""
        trains = np.zeros(len(encoding.ids), dtype=np.bool_)
        edges = list(accumulate((len(piece.text) for piece in example.pieces), initial=0))
        tokens = [_token_at(encoding, edge, text, self.added) for edge in edges]
        if None in tokens:
            return None
        for piece, start, end in zip(example.pieces, tokens, tokens[1:], strict=False):
            trains[start:end] = piece.is_answer
        return self._tokens(encoding.ids, trains)

    def _by_pieces(self, examples: Sequence[Example]) -> list[Tokens]:
        firsts = iter(self._plain([example.pieces[0].text for example in examples if example.pieces]))
        pairs = [(pair, example.complete) for example in examples for pair in pairwise(example.pieces)]
        leads = [self._lead(before.text) if complete else "" for (before, _), complete in pairs]
        rests = iter(self._continued([piece.text for (_, piece), _ in pairs], leads))
        return [
            self._row(example, [next(firsts), *(next(rests) for _ in example.pieces[1:])] if example.pieces else [])
            for example in examples
        ]

    def _row(self, example: Example, parts: list[list[int]]) -> Tokens:
        ids: list[int] = []
        trains: list[bool] = []
        for piece, part in zip(example.pieces, parts, strict=True):
            ended = self._ended(piece.ends, part)
            ids += ended
            trains += [piece.is_answer] * len(ended)
        if not example.complete:
            if ids[: len(self.start)] != self.start:
                ids, trains = self.start + ids, [False] * len(self.start) + trains
            if ids[-1:] != [self.eos]:
                ids.append(self.eos)
                trains.append(bool(example.pieces) and example.pieces[-1].is_answer)
        return self._tokens(ids, np.array(trains, dtype=np.bool_))

    def _ended(self, ends: bool, ids: list[int]) -> list[int]:
        return [*ids, self.eos] if ends and ids[-1:] != [self.eos] else ids

    def _tokens(self, ids: Sequence[int], trains: npt.NDArray[np.bool_]) -> Tokens:
        trained = np.ones(len(ids), dtype=np.bool_) if self.train_on_prompt else trains
        trained[:1] = False
        return Tokens(np.array(ids, dtype=np.int32), trained)

    def _plain(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.fast is not None:
            return [encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _lead(self, before: str) -> str:
        """Return the added token that a text ends with, with the space that it swallows; '' where another text does."""
        words = before.rstrip()
        if not words.endswith(self.added_words):
            return ""
        token = next(token for token in self.added_words if words.endswith(token))
        lead = before[len(words) - len(token) :]
        if lead not in self.lead_ids:
            self.lead_ids[lead] = self._plain([lead])[0]
        return lead if len(self.lead_ids[lead]) == 1 else ""

    def _continued(self, texts: list[str], leads: Sequence[str] = ()) -> list[list[int]]:
        """Tokenize the text as after another one: as _plain does, without the space that a beginning gets.

        leads: the added token that comes right before each text, '' for none: behind one, tokenizers begin anew."""
        done: dict[int, list[int]] = {}
        behind = [number for number, lead in enumerate(leads) if lead]
        for number, ids in zip(behind, self._plain([leads[n] + texts[n] for n in behind]), strict=True):
            if ids[:1] == self.lead_ids[leads[number]]:
                done[number] = ids[1:]
        for sentinel, lead in self.sentinels.items() if self.adds_space else ():
            left = [number for number in range(len(texts)) if number not in done]
            for number, ids in zip(left, self._plain([sentinel + texts[number] for number in left]), strict=True):
                if ids[: len(lead)] == lead:  # else the sentinel has merged with the text: try the next
                    done[number] = ids[len(lead) :]
        left = [number for number in range(len(texts)) if number not in done]
        done |= dict(zip(left, self._plain([texts[number] for number in left]), strict=True))
        return [done[number] for number in range(len(texts))]


def _token_at(encoding: Any, edge: int, text: str, added: Container[int]) -> int | None:
    """Return the first token that begins at character `edge` or behind it; None where one lies across it.

    Space that a tokenizer takes for no token's is passed over, and so is what an added token has swallowed."""
    if edge == 0:
        return 0
    for character in range(edge, len(text)):
        token = encoding.char_to_token(character)
        if token is not None:
            start, end = encoding.token_to_chars(token)
            if start < edge and encoding.ids[token] in added and text[edge:end].isspace():
                return int(token) + 1
            if start < edge:
                return None
            while token and encoding.token_to_chars(token - 1)[0] > edge:  # a token of spaces that were cut off it
                token -= 1
            return int(token)
    return len(encoding.ids)


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts before a text (BOS for Llama and Gemma, nothing for Qwen and SmolLM2)."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    for count in range(len(whole) - len(bare) + 1):
        if whole[count : count + len(bare)] == bare:
            return list(whole[:count])
    return []
