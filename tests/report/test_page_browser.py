"""The page of a run in a real browser: it draws, says nothing, asks for nothing, and is readable at every width."""

import json
from pathlib import Path

import pytest
import transformers

from fsdp_qlora.__main__ import main
from fsdp_qlora.report.page import write_report
from tests.support import tiny
from tests.support.browser import Browser, browser
from tests.support.run_folders import write_lines, write_run
from tests.support.runs import Options, flags, run_alone

VIEWS = [(width, theme) for width in (1280, 390) for theme in ("light", "dark")]
HOSTILE = "<script>fetch('https://example.com')</script><img src=https://example.com/a.png onerror=alert(1)>\"'&amp;"

# Of each text that is seen: its color against the first background behind it, as WCAG 2 counts contrast.
CONTRASTS = """(() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, said = walker.currentNode.textContent.trim();
    if (!said || ["title", "desc"].includes(element.tagName) || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(drawn)), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), said.slice(0, 40)]);
  }
  return found;
})()"""

# What is wider than the window, but for what scrolls in a box of its own.
OUTSIDE = """[...document.querySelectorAll("body *")]
  .filter(element => !element.closest(".scroll, pre") && !element.closest("svg svg"))
  .filter(element => {
    const box = element.getBoundingClientRect();
    return box.width && (box.right > document.documentElement.clientWidth + 0.5 || box.left < -0.5);
  })
  .map(element => element.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def tab():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of train.py with --report true, measured by evaluate; its page is written anew by the command."""
    folder = tmp_path_factory.mktemp("page")
    model = tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE), folder / "base")
    options: Options = {
        "model_name": model, "dataset": tiny.save_rows(folder / "rows.jsonl", 24), "precision": "fp32", "lr": 1e-2,
        "context_length": 64, "batch_size": 2, "lora_rank": 4, "max_steps": 6, "eval_samples": 4, "eval_steps": 3,
        "eval_on_start": "true", "eval_generate": 2, "eval_generate_tokens": 6, "report": "true",
    }  # fmt: skip
    run = run_alone(options, folder / "out")
    assert "not recorded" not in (run.folder / "report.html").read_text()
    asked: Options = {"adapter": run.folder, "dataset": options["dataset"], "dataset_samples": 3, "max_new_tokens": 6}
    assert main(["evaluate", *flags(asked | {"output_dir": run.folder / "evaluation"})]) == 0
    assert main(["report", "--output_dir", str(run.folder)]) == 0
    return run.folder / "report.html"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run on two GPUs that are not here, with rows that try to break out of the page."""
    folder = write_run(tmp_path_factory.mktemp("planned") / HOSTILE.replace("/", ""), 3000)
    said = {"row": 1, "prompt": HOSTILE, "expected": "\u0645\u0631\u062d\u0628\u0627 \u202eabc\x00"}
    answers = [{"step": 0, "answer": HOSTILE * 40}, {"step": 3000, "answer": "w" * 500}]
    write_lines(folder / "eval_answers.jsonl", [said | answer for answer in answers])
    return write_report(folder)


def check(tab: Browser, page: Path, width: int, theme: str) -> None:
    """Assert what holds for any page."""
    tab.open(page.as_uri(), width, theme)
    tab.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.requests() == [page.as_uri()]
    assert tab.complaints() == []
    assert tab.ask("document.scripts.length") == 0
    assert tab.ask("document.documentElement.scrollWidth") <= width
    assert tab.ask(OUTSIDE) == []
    contrasts = tab.ask(CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    paper = tab.ask("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (theme == "light")
    unnamed = 'svg[role="img"]:not([aria-label]):not([aria-labelledby])'
    assert tab.ask(f"document.querySelectorAll({json.dumps(unnamed)}).length") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_the_page_of_a_training_is_drawn_and_readable(tab, trained, width, theme):
    check(tab, trained, width, theme)
    assert tab.ask("[...document.querySelectorAll('.plot svg svg path')].every(path => path.getTotalLength() > 0)")
    seen = tab.ask("document.body.innerText")
    for words in ("6 of 6 steps, finished", "step 0", "step 6", "with it", "without the adapter", "replicate"):
        assert words in seen


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_rows_that_are_markup_stay_text(tab, planned, width, theme):
    check(tab, planned, width, theme)
    texts = tab.ask("[...document.querySelectorAll('.said')].map(one => one.textContent)")
    assert HOSTILE in texts
    assert HOSTILE * 40 in texts
    assert "\u0645\u0631\u062d\u0628\u0627 \\u202eabc\\u0000" in texts
    assert tab.ask("document.querySelectorAll('rect.cell').length") == 3 * 80
    assert tab.ask("document.querySelectorAll('img').length") == 0


@pytest.mark.slow
def test_the_checks_of_a_page_find_what_they_look_for(tab, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><meta name=viewport content="width=device-width"><p style="color:#999">pale</p>'
        '<p style="width:900px">wide</p><script>console.error("said")</script>'
        f'<img src="{(tmp_path / "asked.png").as_uri()}">'
    )
    tab.open(page.as_uri(), 390, "light")
    assert min(tab.ask(CONTRASTS))[0] < 4.5
    assert any("wide" in one for one in tab.ask(OUTSIDE))
    assert any("said" in one for one in tab.complaints())
    assert tab.requests()[1].endswith("asked.png")
