"""Pages name files and code that exist: what is renamed is renamed in the docs as well."""

import re

import pytest

from tests.support.documented_names import exists, missing_files, missing_names
from tests.support.torchrun import ROOT

# A log tells what was there on its day; the others are written by programs and compared by their own tests.
ELSEWHERE = {"docs/LOG.md", "docs/options.md", "docs/rigs.md"}
PAGES = sorted(
    {"README.md", "CONTRIBUTING.md", *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))}
    - ELSEWHERE
)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    assert not missing_files((ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_every_code_name_of_a_page_exists(page):
    assert not missing_names((ROOT / page).read_text())


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_every_link_to_a_file_leads_to_one(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in targets if target and not ((ROOT / page).parent / target).exists()]


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_every_link_to_a_heading_leads_to_one(page):
    links = re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", (ROOT / page).read_text())
    inside = [(target, anchor) for target, anchor in links if "://" not in target]
    assert not [(target, anchor) for target, anchor in inside if anchor not in anchors_of(page, target)]


def anchors_of(page: str, target: str) -> set[str]:
    """Return the anchors of the headings of a page's link, as GitHub makes them."""
    text = ((ROOT / page).parent / target).read_text() if target else (ROOT / page).read_text()
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"]
    assert not [page for page in pages if index.count(f"]({page})") != 1]


def test_a_name_that_is_gone_is_found():
    assert exists("errors.RunEnded.on_every_rank")
    assert not exists("errors.UserError.tell_it_to_the_birds")
    page = "`errors.UserMistake` in `config/gone.py`, `plan.json` beside `config.yaml`\n```\nerrors.first_line\n```\n"
    assert missing_names(page) == ["errors.UserMistake"]
    assert missing_files(page) == ["config/gone.py"]
