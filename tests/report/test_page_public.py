"""What is not on a page that is passed on: names of users and hosts, addresses, passwords, tokens."""

import getpass
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsdp_qlora.report.page import public as module
from fsdp_qlora.report.page import write_report
from fsdp_qlora.report.page.public import public
from tests.support.run_folders import part, write_run

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEF"
SECRETS = ("alice", "bob", "gpu-node-17", "10.11.12.13", TOKEN, "hunter2", "s1gnature", "carol-team")


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user alice, whose home is apart, on a host of a cluster."""
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-node-17")
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/people/alice"))
    module._here.cache_clear()
    yield
    module._here.cache_clear()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/srv/people/alice/rows.jsonl", "~/rows.jsonl"),
        ("/scratch/alice/out and /scratch/alice2", "/scratch/[hidden]/out and /scratch/alice2"),
        ("/home/bob/models/x, /Users/bob", "/home/[hidden]/models/x, /Users/[hidden]"),
        ("https://alice:hunter2@hub.example/rows?a=1", "https://[hidden]@hub.example/rows?a=1"),
        ("https://x.example/f?X-Amz-Signature=s1gnature&b=2", "https://x.example/f?X-Amz-Signature=[hidden]&b=2"),
        (f"401 with {TOKEN}!", "401 with [hidden]!"),
        ("no answer of gpu-node-17:29500 (10.11.12.13)", "no answer of [hidden]:29500 ([hidden])"),
        ("gpu-node-171, 0.00029, meta-llama/Llama-2-70b-hf", "gpu-node-171, 0.00029, meta-llama/Llama-2-70b-hf"),
        ("q_proj, sk-learn, a key=value, 2.13.0", "q_proj, sk-learn, a key=value, 2.13.0"),
    ],
)
def test_names_and_secrets_are_hidden_and_all_else_stays(said, shown):
    assert public(said) == shown


def test_no_name_and_no_secret_is_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run(Path("home/alice/run"), 3)
    (folder / "config.yaml").write_text(
        "model_name: /home/bob/models/tiny\ndataset: https://bob:hunter2@rows.example/a.jsonl?token=s1gnature\n"
        "entity: carol-team\nmaster_addr: gpu-node-17\n# master_addr: gpu-node-17  # no effect: to use it, omit it\n"
        "rows_cache: /srv/people/alice/cache\nproject_name: tiny\n"
    )
    how = f"rank 1: ftp://bob:hunter2@x.example/{TOKEN} at 10.11.12.13 refused gpu-node-17"
    parts = [part(0, ended={"how": how, "step": 3})]
    (folder / "environment.json").write_text(json.dumps({"parts": parts}))
    (folder / "evaluation.json").write_text(json.dumps({"dataset": "/home/bob/held.jsonl", "rows": 1, "adapter": {}}))
    page = write_report(folder).read_text()
    assert [secret for secret in SECRETS if secret in page] == []
    for shown in (
        "<h1>tiny</h1>",
        "/home/[hidden]/models/tiny",
        "~/cache",
        "project_name",
        "/home/[hidden]/held.jsonl",
    ):
        assert shown in page


def test_a_user_without_a_name_has_a_page(tmp_path, monkeypatch):
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setattr(Path, "home", homeless)
    module._here.cache_clear()
    assert write_report(write_run(tmp_path, 3)).exists()


def test_huge_values_of_options_are_cut(tmp_path):
    folder = write_run(tmp_path, 3)
    (folder / "config.yaml").write_text(f"model_name: {'m' * 1_000_000}\nprompt_template: {'p' * 1_000_000}\n")
    page = write_report(folder).read_text()
    assert len(page) < 1_000_000
    assert "800,000 more characters are in config.yaml" in page
