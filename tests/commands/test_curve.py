"""The command curve: its points are train.py's and evaluate's, what is finished stays, changed options are refused."""

import csv
import json
import shlex
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
import torch
import transformers
from safetensors.torch import load_file

import train
from fsdp_qlora.__main__ import main
from fsdp_qlora.commands.curve import points
from tests.support import tiny
from tests.support.runs import Options, flags

ADAPTER, FIGURES = "adapter_model.safetensors", "evaluation.json"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows to train on, other rows to measure on, and an empty model."""
    folder = tmp_path_factory.mktemp("rows")
    every = tiny.save_rows(folder / "every.jsonl", 16).read_text().splitlines(keepends=True)
    every = list(dict.fromkeys(every))
    (folder / "test.jsonl").write_text("".join(every[:4]))
    (folder / "train.jsonl").write_text("".join(every[4:]))
    (folder / "base").mkdir()
    return folder


def asked(material: Path, output: Path, **more: object) -> Options:
    given: Options = {"model_name": material / "base", "dataset": material / "train.jsonl", "gpus": 1, "rows": "2,4,8"}
    return given | {"eval_dataset": material / "test.jsonl", "output_dir": output} | more


def curve(options: Options, code: int = 0) -> None:
    assert main(["curve", *flags(options)]) == code


def words(command: list[str]) -> dict[str, str]:
    """["python", "train.py", "--lr", "1"] -> {"": "train.py", "lr": "1"}."""
    options = dict(pairwise(command))
    return {"": "train.py" if "evaluate" not in command else "evaluate"} | {
        name[2:]: value for name, value in options.items() if name.startswith("--")
    }


class Fake:
    """Stands in for the programs: leaves what they leave, and does `then` at its n-th program in place of that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[dict[str, str]] = []
        self.checks: list[dict[str, str]] = []
        self.then: dict[int, int | type[BaseException]] = {}
        self.check = 0  # exit code
        monkeypatch.setattr(points, "run_program", self)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def __call__(self, command: list[str]) -> int:
        said = words(command)
        if "plan_only" in said:
            self.checks.append(said)
            return self.check
        self.commands.append(said)
        folder = Path(said["output_dir"])
        folder.mkdir(exist_ok=True)
        then = self.then.get(len(self.commands), 0)
        if isinstance(then, int) and not then:
            if said[""] == "evaluate":
                (folder / FIGURES).write_text(json.dumps(figures(int(folder.name.removeprefix("rows-")))))
            else:
                (folder / ADAPTER).write_text("")
        elif said[""] == "train.py":
            (folder / "metrics.jsonl").write_text("")
        if isinstance(then, int):
            return then
        raise then

    @property
    def ran(self) -> list[tuple[str, str]]:
        return [(said[""], Path(said["output_dir"]).name) for said in self.commands]


def figures(count: int) -> dict:
    share = {"right": count, "rows": 10, "share": count / 10, "interval": [0.0, 1.0]}
    state = {
        "loss": 3 - count / 10,
        "loss_interval": [2 - count / 10, 4 - count / 10],
        "label_tokens": 9,
        "loss_rows": 4,
    }
    return {"adapter" if count else "base": state | {"exact": share}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


# ---- real runs


@pytest.mark.slow
def test_points_are_the_runs_of_train_and_the_figures_of_evaluate(material, tmp_path, monkeypatch, capsys):
    """With the base, killed while the last point trains, and started again."""
    base = tiny.save_model(transformers.Qwen2Config(**tiny.SHAPE), tmp_path / "base", torch.bfloat16)
    ran: list[list[str]] = []

    def run_here(command: list[str]) -> int:
        ran.append(command)
        if len(ran) == 5:
            raise KeyboardInterrupt
        return train.main(command[2:]) if "evaluate" not in command else main(command[3:])

    monkeypatch.setattr(points, "run_program", run_here)
    small: Options = {"precision": "fp32", "lora_rank": 2, "lr": 0.02, "batch_size": 2, "context_length": 64}
    options = asked(material, tmp_path / "c", model_name=base, rows="4,0,2", max_new_tokens=2, **small)
    curve(options, 130)
    assert "finished points stay" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "c").glob("rows-*/" + FIGURES)) == [FIGURES] * 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("rows-2/*")}
    curve(options)
    said = capsys.readouterr().out
    assert [words(command)[""] for command in ran[5:]] == ["train.py", "evaluate"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = {n: json.loads((tmp_path / "c" / f"rows-{n}" / FIGURES).read_text()) for n in (0, 2, 4)}
    table = {int(line["rows"]): line for line in csv.DictReader((tmp_path / "c" / "curve.csv").open())}
    assert list(table) == [0, 2, 4]
    for n, line in table.items():
        state = found[n]["adapter" if n else "base"]
        assert [float(line[name]) for name in ("loss", "exact")] == [state["loss"], state["exact"]["share"]]
        ends = [float(line[name]) for name in ("loss_low", "loss_high")]
        assert ends == pytest.approx(state["loss_interval"])
        assert f"\n{n:4}  {state['loss']:.4f} ± " in said
    assert len({line["loss"] for line in table.values()}) == 3
    evaluated = [json.loads(line) for line in (tmp_path / "c" / "rows-4" / "metrics.jsonl").read_text().splitlines()]
    assert evaluated[-1]["eval_loss"] == pytest.approx(found[4]["adapter"]["loss"], rel=1e-5)
    shown = next(line for line in said.splitlines() if line.startswith("rows 4: python train.py "))
    again = shlex.split(shown.partition("train.py ")[2])
    again[again.index("--output_dir") + 1] = str(tmp_path / "by_hand")
    assert train.main(again) == 0
    by_hand, point = (load_file(folder / ADAPTER) for folder in (tmp_path / "by_hand", tmp_path / "c" / "rows-4"))
    assert all(torch.equal(by_hand[name], point[name]) for name in point)


# ---- what runs, what stays


def test_table_record_and_picture_grow_with_the_points(material, tmp_path, fake, capsys):
    fake.then = {4: 1}
    curve(asked(material, tmp_path), 1)
    said = capsys.readouterr()
    assert said.err == (
        "curve: rows 4: evaluate ended with exit code 1 and says why above; finished points stay, and the same command "
        "goes on\n"
    )
    picture = matplotlib.image.imread(tmp_path / "curve.png")
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == 2
    curve(asked(material, tmp_path))
    assert fake.ran[4:] == [("evaluate", "rows-4"), ("train.py", "rows-8"), ("evaluate", "rows-8")]
    record = json.loads((tmp_path / "curve.json").read_text())
    assert [point["rows"] for point in record["points"]] == [2, 4, 8]
    assert [point["exact"]["right"] for point in record["points"]] == [2, 4, 8]
    assert "   8  2.2000 ± 1.0000  8 of 10, 80.0% (49.0% to 94.3%)" in capsys.readouterr().out
    grown = matplotlib.image.imread(tmp_path / "curve.png")
    assert grown.std() > 0.05
    assert (grown != picture).any()


def test_a_loss_that_is_no_number_is_a_figure_of_its_point(material, tmp_path, fake, capsys):
    curve(asked(material, tmp_path))
    file = tmp_path / "rows-4" / FIGURES
    record = json.loads(file.read_text())
    record["adapter"] |= {"loss": None, "loss_interval": None, "perplexity": None}
    file.write_text(json.dumps(record))
    curve(asked(material, tmp_path))
    assert len(fake.ran) == 6, "the point was measured"
    assert "   4  nan              4 of 10" in capsys.readouterr().out
    assert "4,nan,,,0.4," in (tmp_path / "curve.csv").read_text()


def test_a_finished_curve_runs_nothing_and_more_rows_add_points(material, tmp_path, fake, capsys):
    curve(asked(material, tmp_path, rows="8,2"))
    assert fake.ran == [(name, f"rows-{n}") for n in (2, 8) for name in ("train.py", "evaluate")]
    (tmp_path / "curve.png").unlink()
    curve(asked(material, tmp_path, rows="2,8", gpu_memory_gib="null", verbose="true"))
    assert len(fake.commands) == 4
    assert (tmp_path / "curve.png").exists()
    curve(asked(material, tmp_path, rows="0,4"))
    assert fake.ran[4:] == [("evaluate", "rows-0"), ("train.py", "rows-4"), ("evaluate", "rows-4")]
    assert [line.partition(",")[0] for line in (tmp_path / "curve.csv").read_text().split()] == ["rows", *"0248"]


@pytest.mark.parametrize(("more", "told"), [({}, "overwrite_output_dir"), ({"save_steps": 5}, "resume")])
def test_a_point_that_was_killed_goes_on_from_checkpoints_or_anew(more, told, material, tmp_path, fake):
    fake.then = {1: KeyboardInterrupt}
    options = asked(material, tmp_path, rows=4, **more)
    curve(options, 130)
    curve(options)
    assert {"overwrite_output_dir": "true", "resume": "auto"}[told] == fake.commands[1][told]
    assert not {"overwrite_output_dir", "resume"} - {told} & {*fake.commands[1]}
    assert ("overwrite_output_dir" in fake.commands[0]) is False


def test_the_programs_get_the_options_that_are_theirs(material, tmp_path, fake):
    more: Options = {"lr": 1e-5, "base_cache": "null", "eval_samples": 3, "normalize": "words", "answer_batch_size": 2}
    curve(
        asked(
            material, tmp_path, rows="0,4", train_type="lora", max_new_tokens=9, gpus=2, columns="prompt=prompt", **more
        )
    )
    base, trained, measured = fake.commands
    shared = {"columns": "prompt=prompt", "base_cache": "null"}
    asks = {"dataset_samples": "3", "normalize": "words", "batch_size": "2", "max_new_tokens": "9"}
    assert base.items() >= (shared | asks | {"model_name": str(material / "base"), "train_type": "lora"}).items()
    assert measured.items() >= (shared | asks | {"base_too": "false", "adapter": str(tmp_path / "rows-4")}).items()
    assert trained.items() >= (shared | {"lr": "1e-05", "dataset_samples": "4", "eval_samples": "3"}).items()
    assert not {"gpus", "rows", "measures", "normalize", "answer_batch_size", "max_new_tokens"} & {*trained}
    assert not {"adapter", "double_quant", "lr"} & {*base}


# ---- mistakes


def test_a_curve_of_other_options_is_refused(material, tmp_path, fake, capsys):
    train_rows = tmp_path / "train.jsonl"
    train_rows.write_text((material / "train.jsonl").read_text())
    first = asked(material, tmp_path / "c", rows="2,4", dataset=train_rows)
    curve(first)
    for more, told in (
        ({"lr": 0.5}, "lr 0.5 (was 0.0002)"),
        ({"max_new_tokens": 3}, "max_new_tokens 3 (was 256)"),
        ({"gpus": 2}, "gpus 2 (was 1)"),
    ):
        capsys.readouterr()
        curve(first | more, 2)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert f"has a curve of other options: {told}; set them as before" in lines[0]
    with train_rows.open("a") as file:
        file.write('{"prompt": "x", "completion": "y"}\n')
    curve(first, 2)
    assert "the rows of dataset; set them as before" in capsys.readouterr().err
    assert len(fake.commands) == 4
    (tmp_path / "c" / "rows-4" / "checkpoint-3").mkdir()
    fake.then = {5: 1}
    anew = first | {"lr": 0.5, "overwrite_output_dir": "true"}
    curve(anew, 1)
    assert not list((tmp_path / "c").glob(f"rows-*/{FIGURES}")), "figures of other options are no points of this curve"
    assert not (tmp_path / "c" / "rows-4").exists(), "nor may their checkpoints be gone on with"
    curve(first | {"lr": 0.5})
    assert fake.commands[5]["overwrite_output_dir"] == "true", "it was begun before"
    assert "overwrite_output_dir" not in fake.commands[7]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rows": "4,-2"}, ["rows 4,-2", "at least 0"]),
        ({"rows": "4,4"}, ["rows 4,4", "names something twice"]),
        ({"rows": 400}, ["rows 400", "has 12 rows"]),
        ({"dataset_samples": 5}, ["dataset_samples 5", "rows says it"]),
        ({"resume": "auto"}, ["resume auto", "goes on by itself"]),
        ({"save_best": "true"}, ["save_best true", "measure a point"]),
        ({"eval_fraction": 0.5}, ["eval_dataset", "eval_fraction 0.5", "give one of them"]),
        ({"dataset": "a.jsonl:1,b.jsonl:2"}, ["of shares fewer rows are not the first"]),
        ({"dataset": "-"}, ["dataset -", "read once"]),
        ({"eval_dataset": "owner/rows"}, ["eval_dataset owner/rows", "id:config:split"]),
        ({"eval_dataset": "none.jsonl"}, ["eval_dataset 'none.jsonl'"]),
        ({"measures": "loss", "normalize": "words"}, ["normalize words", "no effect", "add exact"]),
        (
            {"train_type": "hqq_lora", "n_bits": 3, "rows": "0,4"},
            ["rows 0,4", "train_type hqq_lora", "--base_too true"],
        ),
        ({"lora_dropout": 2}, ["lora_dropout 2"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(more, told, material, tmp_path, fake, capsys):
    curve(asked(material, tmp_path / "c") | more, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in told), lines
    assert not fake.commands
    assert not (tmp_path / "c").exists()


def test_evaluate_looks_at_its_rows_before_anything_trains_and_once(material, tmp_path, fake, capsys):
    fake.check = 2
    curve(asked(material, tmp_path / "c", max_new_tokens=7), 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "evaluate ended with exit code 2 and says why above; nothing has been trained" in line
    assert not fake.commands
    assert not (tmp_path / "c").exists()
    fake.check = 0
    curve(asked(material, tmp_path / "c", max_new_tokens=7, rows="2"))
    curve(asked(material, tmp_path / "c", max_new_tokens=7, rows="2,4"))
    assert len(fake.checks) == 2, "the points of this curve have been measured"
    (said, _) = fake.checks
    assert said["max_new_tokens"] == "7"
    assert "adapter" not in said


@pytest.mark.slow
def test_an_answer_longer_than_the_model_takes_is_told_before_anything_trains(material, tmp_path):
    base = tiny.save_model(transformers.Qwen2Config(**tiny.SHAPE), tmp_path / "base", torch.bfloat16)
    curve(asked(material, tmp_path / "c", model_name=base, rows="2", precision="fp32", max_new_tokens=100_000), 2)
    assert not (tmp_path / "c").exists()


def test_all_mistakes_are_told_at_once(material, capsys):
    curve({"rows": "x", "lr": -1, "lora_rnk": 3}, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5  # and model_name and eval_dataset are missing
    assert any("did you mean lora_rank?" in line for line in lines)


def test_a_folder_with_other_things_is_refused_and_test_rows_that_are_trained_on_are_told(
    material, tmp_path, fake, capsys
):
    (tmp_path / "mine.txt").write_text("")
    curve(asked(material, tmp_path), 2)
    assert "is not empty" in capsys.readouterr().err
    both = tmp_path / "both.jsonl"
    first = (material / "train.jsonl").read_text().splitlines(keepends=True)[2]
    both.write_text((material / "test.jsonl").read_text() + first)
    curve(asked(material, tmp_path / "c", rows="2", eval_dataset=both))
    assert "note" not in capsys.readouterr().out
    curve(asked(material, tmp_path / "d", rows="3", eval_dataset=both))
    assert "1 of 5 different test row is among the 3 training rows (the first: line 3" in capsys.readouterr().out
    same = tmp_path / "same.jsonl"
    same.write_text(first * 2)
    curve(asked(material, tmp_path / "e", rows="3", eval_dataset=same), 2)
    assert "same.jsonl': all its rows are among the 3 training rows (the first: line 3" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_help_has_its_options_and_those_of_train(capsys):
    assert main(["curve", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: python -m fsdp_qlora curve" in said
    assert all(f"--{name} " in said for name in ("rows", "gpus", "measures", "lora_rank", "save_steps"))
    assert said.count("--eval_dataset ") == 2  # in the usage, and once as an option
