"""Figures of the page against the lines that they are made of, and numbers at the ends of what a float holds."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.report.page import write_report
from fsdp_qlora.report.page.files import loss_text
from fsdp_qlora.report.page.pace import duration
from fsdp_qlora.report.page.svg import axis, label
from tests.support.run_folders import evaluation, part, step, write_lines, write_run


def page_of(folder: Path, lines: list[dict[str, Any]]) -> str:
    write_run(folder, 1)
    write_lines(folder / "metrics.jsonl", lines)
    return write_report(folder).read_text()


def texts(page: str) -> str:
    """Return what is read, tags left out."""
    return " ".join(re.sub("<[^>]+>", " ", page).split())


def test_figures_are_those_of_the_record(tmp_path):
    """A step's own tokens per second count: its seconds are rounded, here by a quarter."""
    lines = [
        step(n) | {"tokens": 1000 + n, "seconds": 0.0004, "tokens_per_second": (1000 + n) / 0.0005, "loss": 3 - n / 10}
        for n in range(1, 11)
    ]
    lines[0] |= {"seconds": 125.0, "tokens_per_second": 8.0}
    seen = texts(page_of(tmp_path, lines))
    speed = statistics.median(line["tokens_per_second"] for line in lines[3:])
    assert f"median speed {speed:,.0f} tok/s after warm-up" in seen
    assert f"tokens {sum(line['tokens'] for line in lines):,}" in seen
    assert "time in steps 2:05 min" in seen
    assert "loss, last step 2.0000 2.9000 in step 1" in seen
    for line in lines:
        del line["tokens_per_second"]
    assert f"median speed {statistics.median(line['tokens'] for line in lines[3:]) / 0.0004:,.0f} tok/s" in texts(
        page_of(tmp_path, lines)
    ), "of a record that has none it is computed"


def test_times_have_their_unit():
    assert [duration(n) for n in (0.26, 7, 307, 3599.7, 3725)] == [
        "0.3 s",
        "7.0 s",
        "5:07 min",
        "1:00:00 h",
        "1:02:05 h",
    ]


@pytest.mark.parametrize(
    ("perplexity", "said"), [(3.49, "3.490"), (12345.6, "12,345.600"), (1e99, "1e+99"), (None, "nan")]
)
def test_a_perplexity_is_never_a_hundred_digits(perplexity, said, tmp_path):
    measured = {"dataset": "d", "rows": 1, "adapter": {"loss": 1.0, "perplexity": perplexity}}
    seen = texts(write_report(write_run(tmp_path, 3, evaluation=measured)).read_text())
    assert f"perplexity {said} " in seen


@pytest.mark.parametrize(
    ("loss", "said"), [(1e-9, "1e-09"), (1234567.0, "1.235e+06"), (0.0, "0.0000"), (-2.5, "-2.5000")]
)
def test_a_loss_is_told_however_small_or_large_it_is(loss, said, tmp_path):
    assert loss_text(loss) == said
    lines = [*(step(n) | {"loss": loss} for n in range(1, 4)), evaluation(3, 0.0) | {"eval_loss": loss}]
    seen = texts(page_of(tmp_path, lines))
    assert f"loss, last step {said} {said} in step 1" in seen
    assert f"evaluation loss {said} lowest {said} at step 3" in seen


def test_numbers_beside_an_axis_differ_and_lie_on_it():
    ranges = [
        (2.5, 2.5 + 1e-5), (2.5, 2.5 + 1e-8), (2.5, math.nextafter(2.5, 3)), (0, 5e-324), (1e-4, 1.0001e-4),
        (1e7, 1e7 + 300), (1e6, 1e6 + 1), (-1e-9, 1e99), (2**53 - 1, 2**53 - 1),
    ]  # fmt: skip
    for low, high in ranges:
        found = axis([low, high])
        assert found.low < found.high
        assert len(found.ticks) > 1
        assert len(set(found.labels)) == len(found.labels), found.labels
        assert all(
            math.isclose(float(a.replace(",", "")), b, abs_tol=1e-12)
            for a, b in zip(found.labels, found.ticks, strict=True)
        )
    assert axis([0], whole=True).ticks == [0, 1], "no step comes before the first"
    assert label(2.5, 1e-9) == "2.5"


def test_of_very_many_evaluations_a_band_is_drawn(tmp_path):
    lines = [evaluation(n, 2.0 + 0.001 * (n % 7)) for n in range(20_000)]
    lines[12_345] |= {"eval_loss": 9.0}
    page = page_of(tmp_path, [step(20_000), *lines])
    assert len(page) < 100_000
    assert "evaluation, lowest to highest of each column" in page
    (band,) = re.findall(r'<path class="area eval" d="M([^"]+)Z"', page)
    assert min(float(point.split()[1]) for point in band.split("L")) == pytest.approx(1000 / 22, abs=1), "the spike"


def test_steps_that_a_full_disk_did_not_take_are_told(tmp_path):
    folder = write_run(tmp_path, 5)
    ended = {"step": 9, "how": "finished"}
    (folder / "environment.json").write_text(json.dumps({"parts": [part(0, steps=9, ended=ended)]}))
    seen = texts(write_report(folder).read_text())
    assert "9 of 9 steps, finished" in seen
    assert "metrics.jsonl ends at step 5 and the run at step 9" in seen
