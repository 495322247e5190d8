"""Rows through the program as a user starts it: shown, piped in, made once for two ranks, refused before all else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import train
from tests.support.runs import flags
from tests.support.tiny import SHAPE, save_model, save_rows
from tests.support.torchrun import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(LlamaConfig(**SHAPE), tmp_path_factory.mktemp("model"))


def options(model: Path, dataset: object, folder: Path, **more: object) -> list[str]:
    return flags({
        "model_name": model, "dataset": dataset, "precision": "fp32", "lora_rank": 2, "context_length": 64,
        "max_steps": 1, "output_dir": folder / "out", "rows_cache": folder / "cache",
    } | more)  # fmt: skip


def test_rows_are_shown_beside_the_plan_and_nothing_is_written(model, tmp_path, capsys):
    rows = save_rows(tmp_path / "rows.jsonl", 5)
    assert train.main(options(model, rows, tmp_path, plan_only="true", show_rows=2)) == 0
    out = capsys.readouterr().out
    assert "5 rows (prompt_completion)" in out
    assert out.count("--- row ") == 2
    first = json.loads(rows.read_text().splitlines()[0])
    assert f"{first['prompt']}«{first['completion']}</s>»" in out
    assert not (tmp_path / "out").exists()


def test_one_bad_row_ends_the_run_before_the_model_is_read_or_is_left_out(model, tmp_path, capsys):
    rows = save_rows(tmp_path / "rows.jsonl", 5)
    rows.write_text(rows.read_text() + '{"prompt": "a", "completion": NaN}\n')
    assert train.main(options(model, rows, tmp_path)) == 2
    assert "line 6: 'completion' is nan, which is no text" in capsys.readouterr().err
    assert train.main(options(model, rows, tmp_path, bad_rows="skip")) == 0
    assert "1 bad row left out (line 6: 'completion' is nan" in capsys.readouterr().out


@pytest.mark.parametrize("more", [{}, {"plan_only": "true"}, {"plan_only": "true", "plan_for": "4090"}])
def test_a_context_beyond_the_model_is_refused_whether_or_not_rows_are_read(model, tmp_path, capsys, more):
    rows = save_rows(tmp_path / "rows.jsonl", 5)
    most = SHAPE["max_position_embeddings"]
    assert train.main(options(model, rows, tmp_path, context_length=most + 1, **more)) == 2
    assert f"context_length {most + 1}: the model takes at most {most} tokens" in capsys.readouterr().err


def test_a_missing_dataset_to_evaluate_on_is_told_before_rows_are_read(model, tmp_path, capsys):
    rows = save_rows(tmp_path / "rows.jsonl", 5)
    rows.write_text(rows.read_text() + '{"prompt": "a", "completion": NaN}\n')
    assert train.main(options(model, rows, tmp_path, eval_dataset=tmp_path / "none.jsonl")) == 2
    told = capsys.readouterr().err
    assert "eval_dataset" in told
    assert "none.jsonl': no such file" in told


@pytest.mark.ranks
def test_two_ranks_share_rows_that_are_piped_in_and_tokenized_once(model, tmp_path):
    """Torchrun gives its standard input to every rank: only one of them can read it."""
    rows = save_rows(tmp_path / "rows.jsonl", 3000)
    program = tmp_path / "counts.py"
    program.write_text(
        "import os, sys\nimport train\nfrom fsdp_qlora.data import rows\nreal = rows.tokenize\n"
        "def told(*given):\n    sys.stdout.write(f\"rank {os.environ['RANK']} tokenizes\\n\")\n"
        "    return real(*given)\n"
        "rows.tokenize = told\nsys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    with rows.open("rb") as piped:
        done = subprocess.run(
            [*command, *options(model, "-", tmp_path, show_rows=1)], stdin=piped, capture_output=True, text=True,
            timeout=200, cwd=ROOT, env=os.environ | env,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" tokenizes\n") == 1
    assert "rank 0 tokenizes" in done.stdout
    assert "-: 3,000 rows (prompt_completion)" in done.stdout
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not list(tmp_path.glob("fsdp_qlora-stdin-*")), "the copy of what was piped in is gone"
