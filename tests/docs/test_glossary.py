"""The glossary explains each word once."""

import re

from tests.support.torchrun import ROOT

ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
ENTRIES = [row for row in ROWS if row[0] != "word" and not row[0].startswith("-")]


def test_each_word_is_explained_once():
    words = [word for word, _, _ in ENTRIES]
    assert len(words) > 40
    assert len(set(words)) == len(words)


def test_words_of_a_section_are_in_order():
    sections = re.split(r"^## ", (ROOT / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)[1:]
    for section in sections:
        words = re.findall(r"^\| (?!word|-)([^|]+?) \|", section, re.MULTILINE)
        assert words == sorted(words, key=str.lower)


def test_each_word_has_one_file():
    assert not [word for word, _, where in ENTRIES if not re.fullmatch(r"`[\w/]+\.py`", where.strip())]
