"""Rates of a card that is not here: its figures (`config/cards.py`) times what the measured cards reach of theirs.

The shares are medians over the runs of benchmarks/results/*-grid.jsonl (H100s and H200s, November 2026), with the
range in brackets; tests/plan/test_expected.py computes them again from these rows, and holds rates made so against the
measured seconds. That other cards reach the same shares is an assumption: such a plan is expected, never measured.
"""

from fsdp_qlora.config.cards import Card
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.rates import Rates

TERA, GIGA = 1e12, 1e9
PRODUCTS = 0.936  # of `reached`, forward [0.88, 0.99] and backward [0.89, 1.00]; 0.92 at 512 to 1,024 tokens
COPY = 0.877  # of device memory's bandwidth: 0.888 of an H100's, 0.866 of an H200's [0.86, 0.89]
DECODE = 0.94  # of copying, decoding weights: 0.878 [0.67, 0.90] in 4,096 columns, 0.956 [0.94, 0.96] in 8,192
LINK = 0.83  # of PCI Express, all cards at once: 0.856 [0.83, 0.88] for one card, 0.824 [0.44, 0.87] for two
# Of that, in and out while the other direction is busy too: one card, and several, which share the host's memory.
BOTH_ALONE = (0.840, 0.906)  # [0.73, 0.94], [0.89, 0.94]
BOTH = (0.663, 0.863)  # [0.61, 0.74], [0.75, 0.97]
THROUGH_HOST = 0.487  # of the link, received in NCCL's gathers through host memory [0.45, 0.79]; reductions the same
NVLINK = 0.423  # of NVLink, received in gathers between two cards [0.42, 0.44]; reductions 0.425
# How many times longer a product takes beside a gather: through host memory from 4,096 tokens on [1.28, 1.34], with
# fewer [1.66, 1.91], and over NVLink [2.07, 2.11].
CROWDING, CROWDING_SHORT, CROWDING_PEERS, SHORT = 1.32, 1.73, 2.11, 4096
# Attention's share of `reached` at S tokens is most * S / (S + half): fits the rows at 2,048 to 32,768 tokens to
# a tenth (0.55 forward and 0.42 backward at 2,048), and is up to 1.6 times theirs at 512, where attention is little.
ATTENTION, ATTENTION_BACKWARD, ATTENTION_HALF = 0.776, 0.588, 850
# Rows that lie one after the other, several hundred tokens and more in a micro-batch: to a fifth at 146 to 2,048 tokens
# a row (0.28 forward and 0.26 backward at 2,048).
FLAT_HALF, FLAT_HALF_BACKWARD = 3200, 2300
# Not measured: PyTorch's memory-efficient attention before Ampere, and plain float32 attention, which makes some ten
# passes over a float32 score of every pair of tokens, seen or not: bytes that 512 FLOPs of a seen pair move.
ATTENTION_BEFORE_AMPERE = 0.5  # of what the others reach
MATH_INTENSITY = 6.0  # FLOPs per byte
# Seconds of the host per launch: [51e-6, 254e-6], median 125e-6, on servers' cores; the five rows from the fastest host
# have 60e-6, and a desktop's cores clock higher than any of these.
LAUNCH = 60e-6


def link_rate(card: Card) -> float:
    """Bytes per second that pinned memory reaches the card at, in a slot of 16 lanes."""
    return LINK * card.link()


def expected_rates(card: Card, facts: Facts, link: float, peers: bool) -> Rates:
    """Of each of `facts.ranks` such cards in one host. link: bytes per second to each, all at once. peers: whether
    they read each other's memory."""
    copy = COPY * card.memory * GIGA
    reached = (card.reached if facts.compute_bytes < 4 else card.float32) * TERA
    # Of few tokens they are bound by reading 2 bytes of a weight for 2 FLOPs a token.
    products = min(PRODUCTS * reached, facts.usual_tokens * copy)
    forward, backward = _attention(card, facts, reached, copy)
    both_in, both_out = BOTH if facts.ranks > 1 else BOTH_ALONE
    gather = 0.0 if facts.ranks == 1 else NVLINK * card.nvlink * GIGA if peers and card.nvlink else THROUGH_HOST * link
    return Rates(
        matmul_forward=products,
        matmul_backward=products,
        attention_forward=forward,
        attention_backward=backward,
        copy=copy,
        dequantize=DECODE * copy,
        h2d=link,
        h2d_both=both_in * link,
        d2h_both=both_out * link,
        gather=gather,
        reduce=gather,
        crowding=_crowding(facts, peers),
        launch=LAUNCH,
    )


def _attention(card: Card, facts: Facts, reached: float, copy: float) -> tuple[float, float]:
    if facts.attention in ("math", "cpu"):
        plain = min(PRODUCTS * card.float32 * TERA / 2, MATH_INTENSITY * copy)  # half of the pairs are not seen
        return plain, plain
    row, most = facts.usual_row, reached * (1 if card.has_bf16 else ATTENTION_BEFORE_AMPERE)
    halves = (FLAT_HALF, FLAT_HALF_BACKWARD) if facts.flat else (ATTENTION_HALF, ATTENTION_HALF)
    forward, backward = (row / (row + half) * most for half in halves)
    return ATTENTION * forward, ATTENTION_BACKWARD * backward


def _crowding(facts: Facts, peers: bool) -> float:
    if facts.ranks == 1:
        return 1.0
    if peers:
        return CROWDING_PEERS
    return CROWDING if facts.usual_tokens >= SHORT else CROWDING_SHORT
