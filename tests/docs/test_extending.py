"""The page on extending is tried: its files are written, its diffs applied, and what it adds trains."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import VaultGemmaConfig

from tests.support import tiny
from tests.support.runs import Options, flags
from tests.support.torchrun import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
STEPS = 3
WORKER = """
import json, sys
from train import main
import fsdp_qlora
print("package", fsdp_qlora.__file__)
for name, arguments in json.load(open(sys.argv[1])).items():
    print(f"{name} ended with {main(arguments)}", flush=True)
"""


def blocks(language: str) -> list[tuple[str, str]]:
    """Return the page's fenced blocks that name a file in their first line, as (file, all lines after it)."""
    fenced = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    named = [block.partition("\n") for block in fenced]
    return [(first.split()[1], rest) for first, _, rest in named if re.match(r"(#|---) \S+\.py$", first)]


def apply(file: Path, diff: str) -> None:
    """Apply each hunk at the one place where its old lines are."""
    text = file.read_text()
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -").rstrip("\n")
        new = "".join(line[1:] for line in lines if line[0] in " +").rstrip("\n")
        if lines:
            assert text.count(old) == 1, f"{file.name} has these lines {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
    file.write_text(text)


@dataclass
class Tried:
    """A copy of the sources with everything that the page adds, and the runs made with it."""

    sources: Path
    said: str

    def losses(self, run: str) -> list[float]:
        lines = (self.sources / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program with the page's files and diffs."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("fsdp_qlora", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    for file, text in blocks("python"):
        assert not (folder / file).exists(), f"{file} is there already"
        (folder / file).write_text(text)
    for file, diff in blocks("diff"):
        apply(folder / file, diff)
    return folder


@pytest.fixture(scope="module")
def tried(sources: Path) -> Tried:
    shape = tiny.SHAPE | {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16}
    common: Options = {
        "model_name": tiny.save_model(VaultGemmaConfig(**shape), sources / "model"),
        "dataset": tiny.save_rows(sources / "rows.jsonl", 12),
        "rows_cache": "null",
        "precision": "fp32",
        "context_length": 56,
        "batch_size": 4,
        "lora_rank": 4,
        "lr": 5e-3,
        "max_steps": STEPS,
    }
    added: Options = {"train_type": "int8_lora", "log_to": "csv"}
    cases = {
        "added": common | added | {"fused": "true"},
        "generic": common | added | {"fused": "false"},
        "nf4": common | {"train_type": "qlora"},
        "unquantized": common | {"train_type": "lora"},
    }
    listing = sources / "cases.json"
    listing.write_text(json.dumps({name: flags(case | {"output_dir": sources / name}) for name, case in cases.items()}))
    command = [sys.executable, "-c", WORKER, str(listing)]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, timeout=300)
    assert all(f"{name} ended with 0" in done.stdout for name in cases), f"{done.stdout}\n{done.stderr}"
    assert f"package {sources}" in done.stdout
    return Tried(sources, done.stdout)


def test_the_pages_files_and_diffs_fit_the_sources_and_their_style(sources):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", "fsdp_qlora"],
        cwd=sources,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_what_the_page_adds_trains(tried):
    assert len(tried.losses("added")) == STEPS
    assert all(map(math.isfinite, tried.losses("added")))
    assert "linears int8" in tried.said


@pytest.mark.slow
def test_the_codec_of_the_page_is_nearer_to_the_weights_than_nf4(tried):
    def distance(run: str) -> float:
        return abs(tried.losses(run)[0] - tried.losses("unquantized")[0])

    assert 0 < distance("added") < distance("nf4")


@pytest.mark.slow
def test_the_family_of_the_page_trains_the_same_in_fused_and_in_generic_blocks(tried):
    assert "3 blocks and 21 projections fused" in tried.said
    assert tried.losses("added") == pytest.approx(tried.losses("generic"), rel=1e-5)


@pytest.mark.slow
def test_the_logger_of_the_page_has_every_step(tried):
    header, *rows = (tried.sources / "added" / "steps.csv").read_text().splitlines()
    assert header.startswith("step,")
    assert [row.split(",")[0] for row in rows] == [str(step + 1) for step in range(STEPS)]
