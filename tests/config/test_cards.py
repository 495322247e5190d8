"""Rigs by name: what is understood, and one line with the names for what is not."""

import pytest

from fsdp_qlora.config.cards import CARDS, Card, rig_of
from fsdp_qlora.config.parse import parse
from fsdp_qlora.errors import UserError

ASKED = ["--model_name", "m", "--plan_only", "true"]


@pytest.mark.parametrize(
    ("text", "count", "card"),
    [
        ("2x4090", 2, "4090"),
        ("4090", 1, "4090"),
        ("4X3090", 4, "3090"),
        ("2 x RTX 5090", 2, "5090"),
        ("1xGeForce_RTX-3090", 1, "3090"),
        ("8xrtx pro 6000", 8, "PRO6000"),
        ("8xa100-80gb", 8, "A100-80"),
        ("1xNVIDIA H100", 1, "H100"),
        ("2xtesla t4", 2, "T4"),
    ],
)
def test_a_rig_is_understood_as_people_write_it(text: str, count: int, card: str) -> None:
    rig = rig_of(text)
    assert (rig.count, rig.card) == (count, CARDS[card])


@pytest.mark.parametrize("text", ["0x4090", "9x4090", "2x4091", "2x", "x4090", "-1x4090", "2.5x4090", "A100", "  "])
def test_no_rig_is_told_in_a_line_with_the_names(text: str) -> None:
    with pytest.raises(UserError) as told:
        parse([*ASKED, f"--plan_for={text}"])
    lines = str(told.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("--plan_for ")
    assert all(name in lines[0] for name in CARDS)
    assert "N from 1 to 8" in lines[0]


def test_the_nearest_card_is_named() -> None:
    with pytest.raises(UserError, match="did you mean A100-"):
        parse([*ASKED, "--plan_for", "1xA100"])


@pytest.mark.parametrize("name", CARDS)
def test_a_cards_figures_are_in_their_units(name: str) -> None:
    """Bounds that a slip of a unit or a row breaks: never more than the paper by a boost clock's share."""
    card: Card = CARDS[name]
    assert 0.6 * card.paper <= card.reached <= 1.15 * card.paper
    assert card.float32 < card.reached
    assert 14 < card.gib < 140
    assert 300 <= card.memory <= 4800
    assert card.has_bf16 == (name not in ("T4", "V100-16", "V100-32"))
    assert card.peers or not card.nvlink
    assert card.link() == pytest.approx({3: 15.75e9, 4: 31.5e9, 5: 63e9}[card.pcie], rel=0.01)
