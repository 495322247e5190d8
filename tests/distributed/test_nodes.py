"""Several nodes: what they must have alike and what may be their own, who is missing, and which way they connect."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import train
from fsdp_qlora.distributed import group, interface
from fsdp_qlora.distributed.alike import check_alike
from fsdp_qlora.distributed.group import await_ranks
from fsdp_qlora.distributed.interface import GLOO_INTERFACE, choose_interface
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.runtime.launcher import Launch
from fsdp_qlora.torch_compat import HashStore
from tests.support.nodes import run_nodes
from tests.support.tiny import SHAPE, save_model, save_rows
from tests.support.torchrun import ROOT, run_torchrun

RANKS = (1, 2)  # of the two nodes

# name -> (options of the second node that the first has otherwise, of both nodes, words of the one line)
DIFFERENCES: dict[str, tuple[dict[str, str], dict[str, str], list[str]]] = {
    "an option": (
        {"lr": "1.0"},
        {},
        ["lr: rank 0 (", ") has 0.0002 and ranks 1, 2 (", ") have 1.0: all nodes must", "same options"],
    ),
    "an option that decides a collective": ({"save_steps": "2"}, {}, ["save_steps: rank 0", "has null and ranks 1, 2"]),
    "a path and none": ({"base_cache": "null"}, {}, ["base_cache: rank 0", "has auto and", "have null"]),
    "other rows": ({"dataset": "{root}/fewer.jsonl"}, {}, ["dataset: rank 0", "has 24 rows", "have 23 rows", "files"]),
    "other weights": ({"model_name": "{root}/other"}, {}, ["model_name: rank 0", "weights with the checksum"]),
    "another config": ({"model_name": "{root}/theta"}, {}, ["model_name: rank 0", "config.json with the checksum"]),
    "checkpoints in folders of their own": (
        {"output_dir": "{root}/unshared"},
        {"save_steps": "1"},
        ["output_dir: {root}/outputs/checkpoints in folders of their own of rank 0 is not seen by ranks 1 on"],
    ),
    "hybrid over unequal nodes": (
        {},
        {"sharding_strategy": "hybrid_full_shard"},
        ["sharding_strategy: hybrid_full_shard keeps a copy", "nodes have 1 and 2 ranks"],
    ),
}
# Folders of its own, with the same in them.
SAME: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "folders of their own": (
        {
            "model_name": "{root}/copy",
            "dataset": "{root}/copy.jsonl",
            "rows_cache": "{root}/rows-cache",
            "base_cache": "{root}/base-cache",
            "output_dir": "{root}/elsewhere",
            "loading_workers": "1",
        },
        {"base_cache": "{root}/first-base-cache", "rows_cache": "{root}/first-rows-cache"},
    ),
}


@dataclass(frozen=True)
class Ended:
    """How a case ended: exit code and standard error of each rank."""

    codes: list[int]
    err: list[str]
    root: Path

    @property
    def lines(self) -> list[str]:
        return [line for text in self.err for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, Ended]:
    """Every case of the tables above, in one launch of two nodes with three ranks."""
    if torch.cuda.is_available():
        pytest.skip("two nodes on one machine would share its GPUs")
    root = tmp_path_factory.mktemp("nodes")
    _make_material(root)
    cases: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
        **{name: (own, both) for name, (own, both, _) in DIFFERENCES.items()},
        **SAME,
    }
    for node in range(2):
        table = {
            name: {"arguments": _arguments(root, name, both, own if node else {}), "largest_file": None}
            for name, (own, both) in cases.items()
        }
        (root / f"cases{node}.json").write_text(json.dumps(table))
    nodes = run_nodes(
        ROOT / "tests/support/ranks_of_cases.py",
        RANKS,
        [[str(root / f"cases{node}.json"), str(root / "results")] for node in range(2)],
        timeout=150,
    )
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(node.stdout + node.stderr for node in nodes)
    of = {n: [json.loads((root / f"results/{n}.{r}.json").read_text()) for r in range(sum(RANKS))] for n in cases}
    return {n: Ended([r["code"] for r in ranks], [r["err"] for r in ranks], root) for n, ranks in of.items()}


def _make_material(root: Path) -> None:
    (root / "results").mkdir()
    save_model(LlamaConfig(**SHAPE), root / "model")
    for name in ("copy", "other", "theta"):
        shutil.copytree(root / "model", root / name)
    tensors = load_file(root / "model/model.safetensors")
    # Neither the first nor the last tensor: one linear of one block, as of an adapter that was merged.
    save_file(
        tensors | {"model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"] * 1.01},
        root / "other/model.safetensors",
        metadata={"format": "pt"},
    )
    settings = json.loads((root / "model/config.json").read_text())
    (root / "theta/config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    save_rows(root / "rows.jsonl", 24)
    shutil.copy(root / "rows.jsonl", root / "copy.jsonl")
    (root / "fewer.jsonl").write_text("".join((root / "rows.jsonl").read_text().splitlines(keepends=True)[1:]))


def _arguments(root: Path, name: str, *changes: Mapping[str, str]) -> list[str]:
    options = {
        "model_name": "{root}/model",
        "dataset": "{root}/rows.jsonl",
        "output_dir": f"{{root}}/outputs/{name}",
        "batch_size": "2",
        "max_steps": "2",
        "precision": "fp32",
        "lora_rank": "4",
        "context_length": "64",
    }
    for change in changes:
        options |= change
    return [text for option, value in options.items() for text in (f"--{option}", value.format(root=root))]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_nodes_have_not_alike_is_one_line_before_anything_is_trained(name, ended):
    case = ended[name]
    assert case.codes == [2, 2, 2], case.err
    assert len(case.lines) == 1, case.lines
    for word in DIFFERENCES[name][2]:
        assert word.format(root=case.root) in case.lines[0]


@pytest.mark.parametrize("name", SAME)
def test_nodes_may_have_the_same_in_folders_of_their_own(name, ended):
    assert ended[name].codes == [0, 0, 0], ended[name].err


class _Two:
    """A rank of two nodes, of which the other has said the same but for what is given."""

    has_several_nodes, rank = True, 1

    def __init__(self, **other: str) -> None:
        self.other = other

    def gather_texts(self, text: str) -> list[str]:
        return [json.dumps(json.loads(text) | self.other), text] if text.startswith("{") else ["n0", "n1"]


def test_another_program_names_both_versions_and_only_what_differs():
    other: World = _Two(torch="2.11.0")  # type: ignore[assignment]
    with pytest.raises(UserError) as met:
        check_alike({"torch": "2.13.0", "transformers": "5.1"}, other, "install the same on every node")
    assert str(met.value) == (
        "torch: rank 0 (n0) has 2.11.0 and rank 1 (n1) has 2.13.0: all nodes must have the same; "
        "install the same on every node"
    )
    assert met.value.told_elsewhere


def test_ranks_that_do_not_come_are_named_and_waited_for_only_so_long(monkeypatch, capsys):
    monkeypatch.setattr(group, "SAID_SECONDS", 0.1)
    monkeypatch.setattr(group, "MISSING_SECONDS", 0.3)
    store = HashStore()
    store.set("came/1", "")
    with pytest.raises(TrainingStopped, match=r"^rank 0: ranks 2, 3 of 4 did not come within"):
        await_ranks(store, Launch(0, 4, 0, 2, "n0", 1))
    assert "waiting for ranks 2, 3 of 4" in capsys.readouterr().err
    store.set("came/2", "")
    store.set("came/3", "")
    await_ranks(store, Launch(0, 4, 0, 2, "n0", 1))


@pytest.mark.parametrize(("local_rank", "said"), [("0", 1), ("1", 0)])
def test_a_mistake_in_one_nodes_command_line_is_told_on_that_node(local_rank, said, monkeypatch, capsys):
    """Its ranks have not met the others yet, of which none may have the mistake."""
    monkeypatch.setenv("RANK", str(2 + int(local_rank)))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(train, "HEAD_START_SECONDS", 0.0)
    assert train.main(["--model_name", "m", "--lora_rnk", "8"]) == 2
    assert capsys.readouterr().err.count("--lora_rnk") == said


def test_the_interface_is_the_one_that_leads_to_the_other_node(monkeypatch):
    environ: dict[str, str] = {}
    monkeypatch.setattr(interface.os, "environ", environ)
    monkeypatch.setattr(interface, "_interface_of", {"10.0.0.1": "eth1", "10.0.0.2": "eth2"}.get)
    monkeypatch.setattr(interface, "_route", lambda launch: ("10.0.0.2", "10.0.0.1"))
    store = HashStore()
    for launch, name in ((Launch(2, 4, 0, 2, "n0", 1), "eth2"), (Launch(1, 4, 1, 2, "127.0.1.1", 1), "eth1")):
        choose_interface(store, launch)
        assert environ.pop(GLOO_INTERFACE) == name
    choose_interface(store, Launch(1, 2, 1, 2, "n0", 1))
    assert not environ, "one node needs none"
    environ[GLOO_INTERFACE] = "mine"
    choose_interface(store, Launch(2, 4, 0, 2, "n0", 1))
    assert environ[GLOO_INTERFACE] == "mine"


def test_the_way_to_a_node_of_this_machine_is_the_loopback():
    assert interface._route(Launch(2, 4, 0, 2, "127.0.0.1", 29500)) == ("127.0.0.1", "127.0.0.1")
    assert interface._interface_of("127.0.0.1") == "lo"
    assert interface._interface_of("203.0.113.77") is None


def test_ranks_that_torchrun_starts_again_meet_each_other_and_not_those_before():
    done = run_torchrun(
        """
        import os
        from fsdp_qlora.config.options import LaunchOptions
        from fsdp_qlora.distributed.world import open_world

        with open_world(LaunchOptions(), 0) as world:
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os._exit(1)
            os.write(1, f"rank {world.rank} met {len(world.gather([1.0]))}\\n".encode())
        """,
        launch=["--standalone", "--max-restarts=1"],
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 met 2" in done.stdout
    assert "rank 1 met 2" in done.stdout
