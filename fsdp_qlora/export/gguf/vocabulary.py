"""A tokenizer as GGUF has it: tokens with their kinds, merges or scores, special tokens, the chat template.

llama.cpp splits text into words by code of its own, one piece for each kind of tokenizer, which the file names. The
kind is read off the tokenizer's own rules; one whose rules are none of these is refused: it would be cut otherwise.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import AddedToken, PreTrainedTokenizerBase

from fsdp_qlora.errors import UserError

SPACE = "\u2581"  # SentencePiece's letter for a space
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
ADDED_SCORE = -1000.0  # of tokens that no merge makes
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")  # in llama.cpp's code for Phi-3 (src/llama-vocab.cpp)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (the expression that splits, whether whole words of the vocabulary are taken unmerged) -> llama.cpp's name
SPLITS = {
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}{1,3}" + _REST, False): "dbrx",
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer. model: `gpt2` for byte-level BPE, `llama` for SentencePiece's. pre: how text is split.

    strips: whether white space behind added tokens is taken away. dropped: added tokens without a row."""

    model: str
    pre: str
    tokens: Sequence[bytes]
    types: Sequence[int]
    scores: Sequence[float] | None
    merges: Sequence[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool | None
    chat_template: str | None
    strips: bool
    dropped: Sequence[str]


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, sentencepiece: Path | None) -> Vocabulary:
    """Return a tokenizer's vocabulary. Raises UserError for a tokenizer that llama.cpp does not have.

    rows: of the embedding, to which it is padded. sentencepiece: its tokenizer.model, where there is one."""
    if not tokenizer.is_fast:
        raise UserError("model_name: its tokenizer has no tokenizer.json, from which a GGUF's vocabulary is made")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    is_spm = rules["model"]["type"] == "BPE" and bool(rules["model"].get("byte_fallback"))
    pre = "default" if is_spm else _split_name(rules)
    ids = {token: i for token, i in tokenizer.get_vocab().items() if i < rows}
    added_tokens = {i: added for i, added in tokenizer.added_tokens_decoder.items() if i < rows}
    dropped = [added.content for i, added in tokenizer.added_tokens_decoder.items() if i >= rows]
    over = max((i for token, i in tokenizer.get_vocab().items() if token not in dropped), default=0)
    if over >= rows:
        raise UserError(
            f"model_name: its tokenizer has token {over} and its embedding {rows} rows: they do not match; name the "
            "model whose tokenizer this is, or put its own tokenizer into the folder"
        )
    strips = _strips(tokenizer, list(added_tokens.values()))
    texts: list[str] = [f"[PAD{i}]" for i in range(rows)]
    types = [int(gguf.TokenType.UNUSED)] * rows
    for text, i in ids.items():
        texts[i], types[i] = text, int(gguf.TokenType.NORMAL)
        if is_spm and BYTE.fullmatch(text):
            types[i] = int(gguf.TokenType.BYTE)
    for i, added in added_tokens.items():
        types[i] = int(gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED)
        texts[i] = added.content.replace(SPACE, " ") if is_spm and not added.special else added.content
    if len({*texts}) < rows:
        twice = next(text for text, count in Counter(texts).items() if count > 1)
        raise UserError(f"model_name: its tokenizer has several tokens {twice!r}, of which llama.cpp finds one only")
    if is_spm and types.count(int(gguf.TokenType.BYTE)) != 256:
        raise UserError("model_name: its tokenizer lacks tokens of single bytes, without which llama.cpp ends")
    if is_spm and tokenizer.unk_token_id is not None and tokenizer.unk_token_id < rows:
        types[tokenizer.unk_token_id] = int(gguf.TokenType.UNKNOWN)
    special = {
        name: getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "unk", "pad")
        if (getattr(tokenizer, f"{name}_token_id") or 0) < rows and getattr(tokenizer, f"{name}_token_id") is not None
    }
    encoded = tokenizer("a")["input_ids"]
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in rules["model"]["merges"]]
    return Vocabulary(
        model="llama" if is_spm else "gpt2",
        pre=pre,
        tokens=[text.encode() for text in texts],
        types=types,
        scores=_scores(texts, types, merges, sentencepiece) if is_spm else None,
        merges=None if is_spm else [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges],
        special=special,
        add_bos=encoded[0] == special.get("bos", -1),
        add_eos=encoded[-1] == special.get("eos", -1),
        add_space=_adds_space(tokenizer) if is_spm else None,
        chat_template=_template(tokenizer),
        strips=strips,
        dropped=dropped,
    )


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    add_id = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }  # fmt: skip
    for name, i in vocabulary.special.items():
        add_id[name](i)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space is not None:
        writer.add_add_space_prefix(vocabulary.add_space)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _strips(tokenizer: PreTrainedTokenizerBase, added_tokens: Sequence[AddedToken]) -> bool:
    """Return whether white space behind added tokens is stripped. Raises UserError for a way that llama.cpp lacks.

    A GGUF file does not say it: llama.cpp strips behind all of Phi-3's but UNSTRIPPED, by the model's name."""
    strips = any(added.rstrip for added in added_tokens)
    for added in added_tokens:
        fixed = strips and added.content not in UNSTRIPPED
        is_pad = added.content == tokenizer.pad_token and not added.rstrip  # in no text
        if added.lstrip or (added.rstrip != fixed and not is_pad):
            raise UserError(
                f"model_name: its tokenizer strips white space around {added.content} as a GGUF file cannot say; merge "
                "it and serve the merged folder"
            )
    absent = [token for token in ("</s>", *UNSTRIPPED) if token not in tokenizer.get_vocab()]
    if strips and absent:
        raise UserError(f"model_name: llama.cpp opens no Phi-3 whose tokenizer lacks {', '.join(absent)}")
    return strips


def _split_name(rules: dict[str, Any]) -> str:
    """Return llama.cpp's name for a byte-level BPE's rules. Raises UserError where it has none."""
    before = rules.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before]) if before else []
    kinds = [part.get("type") for part in parts]
    known = rules["model"]["type"] == "BPE" and bool(kinds) and kinds[-1] == "ByteLevel"
    normal = (rules.get("normalizer") or {}).get("type") in (None, "NFC")
    if known and normal and not parts[-1].get("add_prefix_space"):
        whole_words = bool(rules["model"].get("ignore_merges"))
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and not whole_words:
            return "gpt-2"
        digits = kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits")
        if digits and parts[1].get("use_regex", True) and not whole_words:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
            split = (parts[0]["pattern"].get("Regex"), whole_words)
            if split in SPLITS and parts[0]["behavior"] == "Isolated" and not parts[0].get("invert"):
                return SPLITS[split]
    raise UserError(
        f"model_name: its tokenizer ({rules['model']['type']}, {'+'.join(map(str, kinds)) or 'no splitting'}) splits "
        "text as none of those that are known here to run in llama.cpp: Llama 2 and 3, Mistral, Qwen 2 and 3, Gemma, "
        "Phi-3, SmolLM, GPT-2"
    )


def _scores(texts: Sequence[str], types: Sequence[int], merges: Sequence[list[str]], model: Path | None) -> list[float]:
    """Return SentencePiece's scores from its file, else their order from that of the merges: all that is compared."""
    scores = [ADDED_SCORE if kind in (gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED) else 0.0 for kind in types]
    normal = [i for i, kind in enumerate(types) if kind == gguf.TokenType.NORMAL]
    if model is not None:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(model))
        for i in normal:
            if i >= pieces.vocab_size() or pieces.IdToPiece(i) != texts[i]:
                raise UserError(f"model_name: token {i} of {model} is not {texts[i]!r}, as its tokenizer has it")
            scores[i] = pieces.GetScore(i)
        return scores
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    for i in normal:
        scores[i] = -float(rank.get(texts[i], len(merges)))
    return scores


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0][0] == SPACE)


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
