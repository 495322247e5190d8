"""Writes the quickstart's rows, train.jsonl and heldout.jsonl beside this file: orders, and the tickets made of them.

    python launch/quickstart_data/make.py

The ticket's form is our own invention, so no model knows it: the number in digits, the thing in the singular, what it
is made of, where it goes. Held-out orders are for things, materials and towns that no training row mentions: a model
gets one right only if it has learnt the rule. The same rows come out every time.
"""

import json
import random
from pathlib import Path

TRAIN_ROWS, HELDOUT_ROWS = 240, 40
SYSTEM = "You write tickets for the warehouse."
ORDERS = (
    "Please send {count} {material} {thing}s to {town}.",
    "{town} needs {count} {material} {thing}s.",
    "We want {count} {material} {thing}s shipped to {town}.",
    "A customer in {town} ordered {count} {material} {thing}s.",
    "Pack {count} {material} {thing}s, they go to {town}.",
)
TICKET = "[{number}] {thing}, {material} -> {town}"

# In each list, what is before the bar is for training, what is after it for the held-out rows alone.
THINGS = """lantern bucket hammer kettle basket bottle blanket drawer ladder mirror pencil pillow saddle shovel spoon
table ticket button candle carpet cushion curtain hinge lamp mug plate rope rug stool tray vase wheel whistle chair bell
| bowl clock door fork helmet cup chain hook jar needle pipe ring"""
MATERIALS = """wooden brass copper steel cotton leather silver plastic bamboo rubber woolen paper
| golden glass iron stone"""
TOWNS = """Oslo Paris Madrid Lisbon Dublin Vienna Prague Warsaw Athens Berlin Boston Chicago Dallas Denver Seattle
Toronto Cairo Nairobi Mumbai Tokyo Seoul Beijing Sydney Lima | London Rome Moscow Houston Miami Delhi Geneva Montreal"""

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """2 .. 99 in English."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def rows(count: int, part: int, dice: random.Random) -> list[dict[str, object]]:
    """`count` different rows from the words of one side of the bar (0 training, 1 held out)."""
    things, materials, towns = (words.split("|")[part].split() for words in (THINGS, MATERIALS, TOWNS))
    made: dict[str, dict[str, object]] = {}
    while len(made) < count:
        number = dice.randint(2, 99)
        words = {"thing": dice.choice(things), "material": dice.choice(materials), "town": dice.choice(towns)}
        order = dice.choice(ORDERS).format(count=in_words(number), **words)
        ticket = TICKET.format(number=number, **words)
        turns = (("system", SYSTEM), ("user", order), ("assistant", ticket))
        made[order] = {"messages": [{"role": role, "content": content} for role, content in turns]}
    return list(made.values())


def main(folder: Path) -> None:
    seeded = random.Random(7)
    for name, count, part in (("train", TRAIN_ROWS, 0), ("heldout", HELDOUT_ROWS, 1)):
        lines = [json.dumps(row) + "\n" for row in rows(count, part, seeded)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
