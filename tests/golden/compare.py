"""Compare two records of the runs and name every difference."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().with_name("runs.json")
EXACT = 1e-4  # of a float32 loss, relative, between two environments
ROUNDED = 2e-2  # of a loss of the 16-bit precisions
WHAT_IT_IS = ("family", "ranks", "options")
NUMBERS = {"losses": "loss", "norms": "gradient norm"}


def recorded() -> dict[str, Any]:
    """Return the record that is kept with the code."""
    return json.loads(RECORD.read_text())


def environment_differences(expected: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """Name what two environments have not in common, one line each."""
    names = sorted(expected.keys() | got.keys())
    return [
        f"{name}: recorded with {expected.get(name)}, here {got.get(name)}"
        for name in names
        if expected.get(name) != got.get(name)
    ]


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Name every difference to the last bit between two records, one line each: inputs, cases, losses, adapters."""
    lines = []
    for name in _names(expected["inputs"], got["inputs"]):
        if expected["inputs"].get(name) != got["inputs"].get(name):
            lines.append(f"input {name}: not the same bytes, so its cases cannot be compared")
    for name in _names(expected["cases"], got["cases"]):
        lines += case_differences(name, expected["cases"].get(name), got["cases"].get(name))
    return lines


def case_differences(name: str, expected: Mapping[str, Any] | None, got: Mapping[str, Any] | None) -> list[str]:
    """Name every difference to the last bit between two records of one case."""
    if expected is None or got is None:
        return [f"{name}: {'not recorded' if expected is None else 'recorded, but no case any more'}"]
    lines = [
        f"{name}: {key} expected {expected[key]}, got {got[key]}" for key in WHAT_IT_IS if expected[key] != got[key]
    ]
    for key, word in NUMBERS.items():
        lines += [
            _told(name, word, *step) for step in _steps(expected[key], got[key]) if step[1].hex() != step[2].hex()
        ]
        lines += _count(name, word, expected[key], got[key])
    if expected["adapter"] != got["adapter"]:
        lines.append(f"{name}: adapter expected {expected['adapter'][:16]}, got {got['adapter'][:16]}")
    return lines


def far_losses(name: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Name the losses of one case that differ by more than two environments may."""
    allowed = EXACT if expected["options"]["precision"] == "fp32" else ROUNDED
    lines = [
        f"{_told(name, 'loss', *step)}, allowed {allowed}"
        for step in _steps(expected["losses"], got["losses"])
        if not relative(step[1], step[2]) <= allowed
    ]
    return lines + _count(name, "loss", expected["losses"], got["losses"])


def relative(expected: float, got: float) -> float:
    """Return the difference as a share of what was expected; NaN and infinities are infinitely far from all else."""
    if expected.hex() == got.hex():
        return 0.0
    if not (math.isfinite(expected) and math.isfinite(got)):
        return math.inf
    return abs(got - expected) / abs(expected) if expected else math.inf


def _steps(expected: list[str], got: list[str]) -> Iterator[tuple[int, float, float]]:
    """Give (step from 1, expected, got) for the steps that both have."""
    for step, (a, b) in enumerate(zip(expected, got, strict=False), start=1):
        yield step, float.fromhex(a), float.fromhex(b)


def _told(name: str, word: str, step: int, expected: float, got: float) -> str:
    numbers = f"expected {expected!r} ({expected.hex()}), got {got!r} ({got.hex()})"
    return f"{name}: {word} of step {step} {numbers}, relative difference {relative(expected, got):.2e}"


def _count(name: str, word: str, expected: list[str], got: list[str]) -> list[str]:
    return [] if len(expected) == len(got) else [f"{name}: {len(got)} steps with a {word}, expected {len(expected)}"]


def _names(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Return the names of both, in the order of `got`, then those that only `expected` has."""
    return [*got, *(name for name in expected if name not in got)]
