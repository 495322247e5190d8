"""The page of a run, of whatever is in its folder: figures, texts that could be markup, files that are not whole."""

import errno
import json
import math
import re
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fsdp_qlora.__main__ import main
from fsdp_qlora.config.keep import Keep
from fsdp_qlora.errors import UserError
from fsdp_qlora.plan.placements import PLACEMENT_COSTS
from fsdp_qlora.report.page import write_report
from fsdp_qlora.report.page.blocks import PLACEMENTS, SAVED
from fsdp_qlora.report.page.memory import COLORS
from fsdp_qlora.report.page.style import STYLE
from fsdp_qlora.report.page.svg import axis, label
from fsdp_qlora.runtime.files import LOCK, Claim
from tests.support.run_folders import PARTS, evaluation, part, plan, step, write_lines, write_run
from tests.support.torchrun import ROOT

MARKUP = "<script>alert(1)</script> \"quoted\" & 'single' </div> &lt;"


class Page(HTMLParser):
    """What a reader sees: texts by section, in order; and that all that is opened is closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.sections: dict[str, str] = {}
        self.tags: set[str] = set()
        self._open: list[str] = []
        self._in = "head"
        self.feed(self.html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "section":
            self._in = dict(attrs)["id"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            before = self.sections.get(self._in, "")
            self.sections[self._in] = re.sub(" +", " ", f"{before} {data}".strip())


def page_of(folder: Path, **more: Path) -> Page:
    return Page(write_report(folder, **more))


def test_a_run_is_told_section_by_section(tmp_path):
    seen = page_of(write_run(tmp_path, 1000)).sections
    assert "meta-llama/Llama-2-70b-hf" in seen["head"]
    assert "1,000 of 1,000 steps, finished" in seen["head"]
    assert "22.4 GiB planned 22.6 GiB" in seen["head"]
    assert "mean of 50 steps" in seen["loss"]
    assert "median 2.500 s, after warm-up" in seen["time"]
    assert "2.400 s; measured +4.2 %" in seen["time"]
    for name, gib in PARTS.items():
        assert f"{name} {gib:.2f} GiB" in seen["memory"]
    assert "0 22.40 GiB 22.80 GiB \N{MINUS SIGN}0.9 %" in seen["memory"]
    assert "41.50 GiB measured" in seen["memory"]
    assert "stream: the frozen base is in host memory once per node" in seen["placement"]
    assert "20 of 80" in seen["placement"]
    assert "4: micro-batch x accumulation x ranks = 2 x 1 x 2" in seen["placement"]
    assert "resident on the GPU: 20 blocks" in seen["placement"]
    assert "batch_size 2 1" in seen["options"]
    assert "lora_rank" not in seen["options"].split("config.yaml")[0], "it is the default"
    for words in ("2 x NVIDIA GeForce RTX 4090", "570.86.15", "128.0 GiB", "commit 0123456789ab", "2.13.0"):
        assert words in seen["environment"]
    assert "not in the folder" in seen["answers"]


def test_each_name_of_a_plan_is_known_to_the_page():
    assert PLACEMENTS.keys() == PLACEMENT_COSTS.keys()
    assert list(SAVED) == [level.label for level in Keep]
    assert len(PARTS) == COLORS
    classes = set(re.findall(r"\.([\w-]+) \{ --c", STYLE))
    assert classes >= {f"part-{i}" for i in range(COLORS)} | {f"keep-{level.value}" for level in Keep}


def test_text_from_anywhere_stays_text(tmp_path):
    """From options, rows, figures, versions, the folder's own name and a step's reason to stop."""
    folder = write_run(tmp_path / MARKUP.replace("/", "|"), 3, evaluation={"dataset": MARKUP, "rows": 1, "adapter": {}})
    (folder / "config.yaml").write_text(f"model_name: {json.dumps(MARKUP)}\ndataset: {json.dumps(MARKUP)}\n")
    parts = [part(0, versions={MARKUP: MARKUP}, program=MARKUP, ended={"how": MARKUP})]
    (folder / "environment.json").write_text(json.dumps({"parts": parts}))
    record = plan(2)
    record["plan"]["placement"], record["plan"]["parts"] = MARKUP, {MARKUP: 1}
    record["plan"]["blocks"][0]["keep"] = MARKUP
    (folder / "plan.json").write_text(json.dumps(record))
    said = {"step": 1, "row": 1, "prompt": MARKUP, "answer": MARKUP, "expected": MARKUP}
    write_lines(folder / "eval_answers.jsonl", [said])
    write_lines(folder / "metrics.jsonl", [step(1), step(2) | {"stopped": MARKUP, "loss": None}])
    page = page_of(folder)
    assert not {"script", "b", "img"} & page.tags
    for name, count in {"head": 2, "loss": 1, "memory": 1, "placement": 2, "answers": 3, "options": 2}.items():
        assert page.sections[name].count(MARKUP) >= count, name
    for name in ("evaluation", "environment"):
        assert MARKUP in page.sections[name]


def test_what_a_browser_would_not_show_stands_as_its_number(tmp_path):
    folder = write_run(tmp_path, 3)
    said = "nul \0 bell \a half \ud800 turned \u202e \u0645\u0631\u062d\u0628\u0627 \N{PILE OF POO}\r\nnext"
    write_lines(folder / "eval_answers.jsonl", [{"step": 1, "row": 1, "prompt": "", "answer": said}])
    page = page_of(folder)
    shown = "nul \\u0000 bell \\u0007 half \\ud800 turned \\u202e \u0645\u0631\u062d\u0628\u0627 \N{PILE OF POO}\nnext"
    assert shown in page.sections["answers"]
    assert "(empty)" in page.sections["answers"]
    assert page.html.count('dir="auto"') == 1


def test_long_answers_are_closed_and_nothing_of_them_is_lost(tmp_path):
    folder = write_run(tmp_path, 3)
    long, endless = "0123456789" * 100 + "END", "x" * 300_000
    lines = [{"step": 1, "row": row, "prompt": "p", "answer": said} for row, said in enumerate((long, endless))]
    lines += [{"step": 1, "row": row, "prompt": "p", "answer": "a"} for row in range(2, 50)]
    write_lines(folder / "eval_answers.jsonl", lines)
    page = page_of(folder)
    assert long in page.sections["answers"]
    assert "1,003 characters" in page.sections["answers"]
    assert "100,000 more characters are in eval_answers.jsonl" in page.sections["answers"]
    assert "20 more rows are in eval_answers.jsonl" in page.sections["answers"]


def test_the_first_and_the_last_answer_to_a_row_stand_side_by_side(tmp_path):
    folder = write_run(tmp_path, 3)
    lines = [
        {"step": at, "row": row, "prompt": f"asked {row}", "answer": f"said {row} at {at}", "expected": f"right {row}"}
        for at in (0, 2, 3) for row in (7, 8)
    ]  # fmt: skip
    write_lines(folder / "eval_answers.jsonl", lines)
    seen = page_of(folder).sections["answers"]
    assert "row 7 asked asked 7 expected right 7 step 0 said 7 at 0 step 3 said 7 at 3" in seen
    assert "at 2" not in seen


def test_figures_and_answers_of_evaluate_are_shown_with_the_adapter_and_without(tmp_path):
    folder = write_run(tmp_path / "run", 3)
    share = {"right": 3, "rows": 4, "share": 0.75, "interval": [0.3, 0.95]}
    figures = {"loss": 1.25, "loss_interval": [1.0, 1.5], "perplexity": 3.49, "exact": share}
    record = {"dataset": "rows.jsonl", "rows": 4, "adapter": figures, "base": figures | {"loss": 2.5}}
    record |= {"exact_compared": {"only_adapter": 2, "only_base": 0, "p": 0.5}}
    elsewhere = tmp_path / "measured"
    elsewhere.mkdir()
    (elsewhere / "evaluation.json").write_text(json.dumps(record))
    for name, right in (("answers.jsonl", True), ("answers_base.jsonl", False)):
        write_lines(elsewhere / name, [{"row": 1, "prompt": "p", "answer": name, "expected": "e", "right": right}])
    seen = page_of(folder, evaluation=elsewhere).sections["evaluation"]
    assert "loss 2.5000 (1.0000 to 1.5000) 1.2500 (1.0000 to 1.5000)" in seen
    assert "exactly right 3 of 4, 75.0% (30.0% to 95.0%)" in seen
    assert "without the adapter not right answers_base.jsonl with it right answers.jsonl" in seen
    assert "only the adapter answers right: 2; only the base: 0" in seen
    (folder / "evaluation.json").write_text(json.dumps({"dataset": "d", "rows": 1, "adapter": {}}))
    (folder / "adapter_model.safetensors").write_text("a later one")
    assert "is older than the adapter" in page_of(folder).sections["evaluation"]


def test_each_part_of_a_resumed_run_has_its_environment(tmp_path):
    folder = write_run(tmp_path, 20)
    parts = [part(0, ended={"how": "stopped by SIGTERM"}), part(10, versions={"torch": "2.14.0"}, gpus=[])]
    (folder / "environment.json").write_text(json.dumps({"parts": parts}))
    seen = page_of(folder).sections
    assert "from step 1 from step 11" in seen["environment"]
    assert "torch 2.13.0 2.14.0" in seen["environment"]
    assert "of the steps after 10, after warm-up" in seen["time"]
    assert "These peaks are of the steps after 10" in seen["memory"]
    assert "22.4 GiB planned 22.6 GiB, after step 10" in seen["head"]
    assert "it is still going on, or was killed" in seen["head"], "how the last part ended counts"
    (folder / "environment.json").write_text(json.dumps({"parts": parts[1:]}))
    assert "What steps up to 10 ran on is not recorded." in page_of(folder).sections["environment"]


def test_what_was_lost_on_the_way_is_counted(tmp_path):
    folder = write_run(tmp_path, 0)
    lines = [step(n, gpu_retries=[n, 2 * n]) for n in range(1, 9)]
    lines[3] |= {"step_retries": 2}
    lines[4] |= {"grad_norm": None}
    lines[5] |= {"gpu_retries": [50, 60]}  # of another process, whose count began anew
    lines = [*lines[:6], step(7, gpu_retries=[50, 61]), step(8, gpu_retries=[50, 61])]
    parts = [part(0), part(5, steps=9)]
    (folder / "environment.json").write_text(json.dumps({"parts": parts}))
    write_lines(folder / "metrics.jsonl", [*lines, step(9) | {"loss": None, "stopped": "the loss is nan"}])
    seen = page_of(folder).sections
    assert "2 times, as GPU memory ran out in step 4" in seen["time"]
    assert "1, as gradients overflowed: 5" in seen["time"]
    assert "allocator's stops 9:" in seen["time"]  # 8 of rank 1 before, 1 behind
    assert "Step 9 ended the run: the loss is nan" in seen["loss"]
    assert "8 of 9 steps, step 9: the loss is nan" in seen["head"]


def test_a_run_that_is_going_on_is_told_and_half_a_line_left_out(tmp_path):
    folder = write_run(tmp_path, 5)
    (folder / "environment.json").write_text(json.dumps({"parts": [part(0)]}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with Claim() as claim:
        claim.take(folder, overwrite=True)
        page = page_of(folder)
    assert "5 of 1,000 steps, still going on. Written" in page.sections["head"]
    assert "metrics.jsonl: the last line is half written; left out here." in page.html
    (folder / LOCK).write_text("process 1 on another-machine\n")
    assert "still going on on another machine, or killed there" in page_of(folder).sections["head"]
    (folder / LOCK).write_text(f"process 1 on {socket.gethostname()}\n")
    assert "it is still going on, or was killed" in page_of(folder).sections["head"]


def test_a_run_on_a_cpu_without_evaluations_says_what_it_has_not(tmp_path):
    folder = write_run(tmp_path, 0)
    alone = {"gpu_allocated_gib": [], "gpu_reserved_gib": [], "gpu_retries": [], "host_rss_gib": [0.5]}
    write_lines(folder / "metrics.jsonl", [step(n) | alone for n in range(1, 6)])
    record = plan(2) | {"rates": None}
    record["plan"] |= {"seconds": None, "placement": "replicate"}
    (folder / "plan.json").write_text(json.dumps(record))
    seen = page_of(folder).sections
    assert "not known: a plan has times only where a GPU was measured" in seen["time"]
    assert "planned, for each rank" in seen["memory"]
    assert "peak allocated" not in seen["memory"]
    assert "host memory, peak 0.50 GiB" in seen["head"]
    assert "evaluation" not in seen["head"] + seen["loss"]


DAMAGED = {
    "not JSON": "{",
    "another's": '{"plan": [], "parts": 3, "facts": null}',
    "a list": "[1, 2]",
    "deep": "[" * 100_000,
    "bytes": "\0\0\0",
    "numbers": '{"plan": {"blocks": [{}]}, "parts": [{"from_step": "x"}], "facts": {}, "rates": 1, "rows": {}}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_one_sentence(text, tmp_path):
    folder = write_run(tmp_path, 3)
    for name in ("plan.json", "environment.json", "evaluation.json"):
        (folder / name).write_text(text)
    for name in ("metrics.jsonl", "eval_answers.jsonl"):
        (folder / name).write_text(f"{text}\n")
    (folder / "config.yaml").write_text("model_name: [\n")
    seen = page_of(folder).sections
    for name, file in {"placement": "plan", "environment": "environment", "evaluation": "evaluation"}.items():
        assert f"{file}.json is damaged" in seen[name]
    assert "config.yaml is damaged: malformed YAML" in seen["options"]
    assert "No step is finished yet" in seen["loss"]
    assert "eval_answers.jsonl has no answers yet. eval_answers.jsonl: 1 line could not be read" in seen["answers"]


def test_lists_that_lie_too_deep_are_damage(tmp_path):
    folder = write_run(tmp_path, 3)
    (folder / "config.yaml").write_text(f"model_name: {'[' * 100_000}\n")
    assert "config.yaml is damaged: lists lie too deep" in page_of(folder).sections["options"]


def test_numbers_that_no_run_has_are_no_end_of_the_page(tmp_path):
    folder = write_run(tmp_path, 5)
    wild = [1e308, -1e308, 10**400, "7", None, True, [], {}, float("nan"), float("inf"), -0.0, 5e-324]
    with (folder / "metrics.jsonl").open("a") as file:
        for i, value in enumerate(wild):
            named = {name: value for name in ("loss", "lr", "tokens", "seconds", "grad_norm", "step_retries")}
            named |= {"gpu_allocated_gib": [value], "host_rss_gib": value, "gpu_retries": [value]}
            file.write(json.dumps(named | {"step": 6 + i}) + "\n")
            file.write(json.dumps({"step": value, "loss": 1.0}) + "\n")
            file.write(json.dumps({"step": 6 + i, "eval_loss": value, "eval_seconds": value}) + "\n")
    record = plan(3)
    record["plan"] |= {
        "device_bytes": 1e308,
        "host_bytes": -1,
        "seconds": 0,
        "parts": dict.fromkeys("abcdefghi", 1e308),
    }
    (folder / "plan.json").write_text(json.dumps(record))
    page = page_of(folder)
    assert not re.search(r' (d|c?[xy][12]?|width|height)="[^"]*(nan|inf)', page.html)
    assert "17 of 5" in page.sections["head"]


def test_a_peak_that_is_no_number_has_no_bar(tmp_path):
    folder = write_run(tmp_path, 5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(6, gpu_allocated_gib=[None, 22.1], gpu_reserved_gib=[22.8, None])) + "\n")
    page = page_of(folder)
    assert page.html.count('class="measured"') == page.html.count('class="reserved"') == 1
    assert "nan%" not in page.html


def test_a_folder_that_tells_only_a_part_is_shown_so_far(tmp_path):
    """As an old version left it, as the point of a curve without rows, as after a loading that failed."""
    folder = write_run(tmp_path, 3)
    (folder / "environment.json").unlink()
    assert "what this run ran on is not recorded" in page_of(folder).sections["environment"]
    assert "how it ended is not recorded" in page_of(folder).sections["head"]
    write_lines(folder / "metrics.jsonl", [evaluation(0, 2.5)])
    seen = page_of(folder).sections
    assert "evaluation loss 2.5000" in seen["head"]
    assert "1,000 steps" not in seen["loss"]
    for name in ("plan.json", "metrics.jsonl"):
        (folder / name).unlink()
    seen = page_of(folder).sections
    assert "plan.json is not in the folder" in seen["placement"]
    for name in ("loss", "time"):
        assert "metrics.jsonl is not in the folder: no step is recorded." in seen[name]
    assert "Nothing was measured" in seen["memory"]
    point = tmp_path / "rows-0"
    point.mkdir()
    (point / "evaluation.json").write_text(json.dumps({"dataset": "d", "rows": 1, "base": {"loss": 1.5}}))
    assert "without the adapter loss 1.5000" in page_of(point).sections["evaluation"]


def test_a_plan_of_before_it_had_a_micro_batch_of_its_own_is_shown(tmp_path):
    folder, record = write_run(tmp_path, 3), plan()
    for name in ("micro_batch", "accumulation", "loading_bytes", "arena_bytes"):
        del record["plan"][name]
    (folder / "plan.json").write_text(json.dumps(record))
    assert "4: micro-batch x accumulation x ranks = 2 x 1 x 2" in page_of(folder).sections["placement"]


def test_options_of_another_version_are_shown_as_they_stand(tmp_path):
    folder = write_run(tmp_path, 1)
    (folder / "config.yaml").write_text("model_name: a/b\nwarp_speed: 9\nlora_rank: many\nlog_to: [tqdm, stdout]\n")
    seen = page_of(folder).sections["options"]
    assert "lora_rank many 64" in seen
    assert "log_to tqdm,stdout tqdm" in seen
    assert "This version of the program has no warp_speed." in seen


def test_many_steps_are_a_small_page_that_loses_no_spike(tmp_path):
    folder = write_run(tmp_path, 0)
    lines = [step(n) for n in range(1, 20_001)]
    lines[12_345] |= {"loss": 9.0}
    write_lines(folder / "metrics.jsonl", lines)
    start = time.process_time()
    page = page_of(folder)
    assert time.process_time() - start < 2
    assert len(page.html) < 150_000
    (band,) = re.findall(r'<path class="area step" d="M([^"]+)Z"', page.html.split('id="time"')[0])
    heights = [float(point.split()[1]) for point in band.split("L")]
    assert len(heights) == 1600
    highest, second = sorted(heights)[:2]
    assert highest == pytest.approx(1000 / 22, abs=1), "the top of the picture is a twentieth above the spike"
    assert second > 600


def test_axes_have_few_round_numbers():
    for low, high in ((0, 1), (1.2345, 1.2346), (-5, 1e6), (0, 2e-4), (7, 7), (0, 0), (-1e99, 1e99)):
        for whole in (False, True):
            found = axis([low, high, math.nan, math.inf], whole)
            assert found.low <= low <= high <= found.high
            assert 1 <= len(found.ticks) <= 7 or whole
            spare = (found.high - found.low) * 1e-6
            assert all(found.low - spare <= tick <= found.high + spare for tick in found.ticks)
    assert axis([1, 100_000], whole=True).ticks == [20_000, 40_000, 60_000, 80_000, 100_000]
    labels = ["0", "100,000", "0.25", "5e-5", "0.3", "-3"]
    assert [label(value) for value in (0, 100_000, 0.25, 5e-5, 0.1 + 0.2, -3)] == labels


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = write_run(tmp_path, 3)
    before = write_report(folder).read_text()

    def full(path: Path, text: str, encoding: str) -> int:
        with path.open("w", encoding=encoding) as file:
            file.write(text[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text() == before
    assert not list(folder.glob(".*"))


def test_the_command_waits_for_no_pytorch(tmp_path):
    code = "import sys; from fsdp_qlora.__main__ import main; main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "report", "--output_dir", str(write_run(tmp_path, 3))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", 3)
    empty, curve = tmp_path / "empty", tmp_path / "curve"
    empty.mkdir()
    curve.mkdir()
    (curve / "curve.json").write_text("{}")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    cases = {
        ("--output_dir", tmp_path / "nowhere"): "nowhere is no folder; give the output_dir of a run of train.py",
        ("--output_dir", empty): "has none of a run's files (config.yaml, plan.json, metrics.jsonl,",
        ("--output_dir", curve): "or that of a point of this curve, as rows-200",
        ("--output_dir", run, "--output_file", tmp_path / "mine.html"): "mine.html exists and is no report;",
        ("--output_dir", run, "--output_file", tmp_path / "mine.html" / "x"): "output_file: ",
        ("--output_dir", run, "--evaluation_dir", tmp_path / "no"): "evaluation_dir: ",
        ("--output_folder", run): "output_folder",
    }  # fmt: skip
    for given, words in cases.items():
        assert main(["report", *map(str, given)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert words in said.err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert not list(empty.iterdir())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "output")
    assert main(["report"]) == 0
    assert main(["report", "--output_file", "again.html"]) == 0
    assert main(["report", "--output_file", "again.html"]) == 0
    assert capsys.readouterr().out.splitlines() == ["saved   output/report.html", *["saved   again.html"] * 2]
    with pytest.raises(UserError, match="none of a run's files"):
        write_report(empty)
