"""Cards by name, as their data sheets have them, and rigs of several alike: for plans of machines that are elsewhere.

Reads nothing and needs no torch, so that a misspelt rig is told with all other mistakes in the options.
"""

import re
from dataclasses import dataclass

from fsdp_qlora.config.option import nearest

MOST_CARDS = 8  # of a rig: one host
# Bytes per second and direction of a PCI Express lane, by generation: transfers a second (8, 16, 32 GT/s), of whose 130
# bits 128 are data (PCI Express base specifications 3.0 to 5.0).
LANE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}


@dataclass(frozen=True)
class Card:
    """A card as its data sheet has it, dense rates and never those with sparsity, and what PyTorch reaches on it.

    gib: what a process sees in all, GiB (`torch.cuda.mem_get_info`); what a desktop shows on it goes off.
    paper: TFLOP/s of 16-bit products summed in float32, which GeForce cards do at half of their rate for float16 sums.
    reached, float32: TFLOP/s that `torch.matmul` was publicly measured to reach, bfloat16 (float16 where there is none)
    and float32. memory: GB/s. pcie: generation, of 16 lanes. capability: CUDA's. peers: whether the driver lets such
    cards read each other's memory. multiprocessors: streaming ones, as CUDA counts them. nvlink: GB/s of a card in one
    direction, 0 where cards are usually without."""

    name: str
    gib: float
    paper: float
    reached: float
    float32: float
    memory: float
    pcie: int
    capability: tuple[int, int]
    multiprocessors: int
    peers: bool
    nvlink: float = 0.0

    @property
    def has_bf16(self) -> bool:
        return self.capability >= (8, 0)

    def link(self, lanes: int = 16) -> float:
        """Return bytes per second and direction to host memory, on paper."""
        return LANE[self.pcie] * lanes


# paper, memory, pcie, capability, multiprocessors, nvlink: NVIDIA's whitepapers "Ampere GA102 GPU Architecture" (3090,
# A6000), "Ada GPU Architecture" (4090), "RTX Blackwell GPU Architecture" (5090), "RTX PRO Blackwell GPU Architecture"
# (PRO6000), and the data sheets of L40S, A100, H100 SXM, H200 SXM, T4, V100 SXM2.
# reached, float32: medians of the entries in github.com/zzc0721/torch-performance-test-data, database.md of 2026-01-12:
# one script on all cards, the best of squares of 1,024 to 10,240. (A 5090 with less power was reported at 179.)
# gib: "total capacity" in PyTorch's out-of-memory messages in public issue trackers, the lowest of several.
# peers: NVIDIA's driver gives GeForce cards none (3090s with a bridge have it; patched drivers are not counted on).
CARDS = {
    "3090": Card("RTX 3090", 23.6, 71.0, 76.6, 24.8, 936, 4, (8, 6), 82, peers=False),
    "4090": Card("RTX 4090", 23.6, 165.2, 165.0, 54.7, 1008, 4, (8, 9), 128, peers=False),
    "5090": Card("RTX 5090", 31.3, 209.5, 238.0, 68.4, 1792, 5, (12, 0), 170, peers=False),
    "PRO6000": Card("RTX PRO 6000 Blackwell", 94.9, 503.8, 413.7, 77.1, 1792, 5, (12, 0), 188, peers=True),
    "A6000": Card("RTX A6000", 47.5, 154.8, 123.3, 23.9, 768, 4, (8, 6), 84, peers=True),
    "L40S": Card("L40S", 44.4, 362.0, 269.2, 46.9, 864, 4, (8, 9), 142, peers=True),
    "A100-40": Card("A100 SXM 40GB", 39.4, 312.0, 240.2, 17.8, 1555, 4, (8, 0), 108, peers=True, nvlink=300),
    "A100-80": Card("A100 SXM 80GB", 79.1, 312.0, 264.5, 19.2, 2039, 4, (8, 0), 108, peers=True, nvlink=300),
    "H100": Card("H100 SXM 80GB", 79.1, 989.4, 790.6, 52.0, 3352, 5, (9, 0), 132, peers=True, nvlink=450),
    "H200": Card("H200 SXM", 139.8, 989.4, 790.3, 51.3, 4800, 5, (9, 0), 132, peers=True, nvlink=450),
    "T4": Card("T4", 14.5, 65.0, 41.9, 4.4, 320, 3, (7, 5), 40, peers=True),
    "V100-16": Card("V100 SXM2 16GB", 15.7, 125.0, 94.8, 14.1, 900, 3, (7, 0), 80, peers=True, nvlink=150),
    "V100-32": Card("V100 SXM2 32GB", 31.7, 125.0, 94.8, 14.1, 900, 3, (7, 0), 80, peers=True, nvlink=150),
}
MAKERS = ("nvidia", "geforce", "tesla", "rtx")  # words before a card's name that say nothing more


@dataclass(frozen=True)
class Rig:
    """Cards of one kind in one host."""

    count: int
    card: Card

    def __str__(self) -> str:
        return f"{self.count} x {self.card.name}"


def rig_of(text: str) -> Rig:
    """Return the rig that `2x4090` means; `4090` alone is one. Upper or lower case, with or without "RTX" or spaces.

    Raises ValueError with what is wrong and what there is."""
    allowed = f"give NxCARD, N from 1 to {MOST_CARDS}, CARD one of {', '.join(CARDS)}"
    found = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(.+)", text.lower())
    if found is None:
        raise ValueError(f"{text!r} names no card; {allowed}")
    count, wanted = int(found[1] or 1), _plain(found[2])
    if not 1 <= count <= MOST_CARDS:
        raise ValueError(f"{count} cards are not a rig; {allowed}")
    names = {_plain(name): name for name in CARDS}
    if wanted not in names:
        near = nearest(wanted, list(names))
        meant = f"; did you mean {names[near]}?" if near else ";"
        raise ValueError(f"there is no card {found[2].strip().upper()!r} in the table{meant} {allowed}")
    return Rig(count, CARDS[names[wanted]])


def _plain(name: str) -> str:
    """Return a name without spaces, hyphens, the maker's words and a "GB" at the end."""
    plain = re.sub(r"[\s_-]", "", name.lower())
    for word in MAKERS:
        plain = plain.removeprefix(word)
    return plain.removesuffix("gb")
