"""What `--verbose true` says more, and that no option is there which nobody reads."""

import dataclasses
import re

from transformers import LlamaConfig

from fsdp_qlora.config.parse import parse
from fsdp_qlora.report.machine import rates_line
from tests.support import tiny
from tests.support.known_runs import H200
from tests.support.torchrun import ROOT, run_torchrun


def test_verbose_tells_machine_and_stages_once(tmp_path):
    model = tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path / "model")
    options = ["--model_name", str(model), "--dataset", "dummy", "--dataset_samples", "2", "--batch_size", "1"]
    options += ["--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--context_length", "32"]
    loud = run_torchrun(ROOT / "train.py", 2, [*options, "--verbose", "true"])
    assert loud.returncode == 0, loud.stderr
    assert len(re.findall(r"^machine   (2 x )?\S.*GiB of host memory$", loud.stdout, re.M)) == 1, loud.stdout
    assert len(re.findall(r"^          Python 3\.\d+\.\d+, torch 2\.\d+.*transformers 5", loud.stdout, re.M)) == 1
    stages = re.findall(r"^started   in (\d+\.\d) s: (.*)$", loud.stdout, re.M)
    assert len(stages) == 1, loud.stdout
    total, parts = stages[0]
    named = dict(part.rsplit(" ", 2)[:2] for part in parts.split(", "))
    assert list(named) == ["imports", "ranks", "config and data", "model", "plan", "loading"]
    assert abs(float(total) - sum(map(float, named.values()))) < 0.5
    assert float(named["imports"]) > 0.3, "from the start of the process, not of its code"
    quiet = run_torchrun(ROOT / "train.py", 2, [*options, "--overwrite_output_dir", "true"])
    assert quiet.returncode == 0, quiet.stderr
    assert not re.search(r"^(machine|started|rates) ", quiet.stdout, re.M)


def test_rates_are_told_in_the_units_of_data_sheets():
    told = rates_line(dataclasses.asdict(H200))
    assert f"products {H200.matmul_forward / 1e12:,.0f} / {H200.matmul_backward / 1e12:,.0f} TFLOP/s" in told
    assert f"to the GPU {H200.h2d / 1e9:.1f} GB/s" in told
    assert told.endswith(f"a launch {H200.launch * 1e6:.0f} us")
    assert "between ranks" in told
    assert "between ranks" not in rates_line(dataclasses.asdict(H200) | {"gather": 0.0, "reduce": 0.0}), "a lone rank"


def test_every_option_is_read_somewhere():
    declared = {"groups", "rules.py", "help.py"}
    files = [
        path
        for path in [ROOT / "train.py", *(ROOT / "fsdp_qlora").rglob("*.py")]
        if "config" not in path.parts or not declared & set(path.parts)
    ]
    program = "\n".join(p.read_text() for p in files)
    config = parse(["--model_name", "any"])
    groups = [getattr(config, field.name) for field in dataclasses.fields(config)]
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    assert len(names) > 50
    assert not [name for name in names if not re.search(rf"\.{name}\b", program)]
