"""`merge` and `gguf` killed in the middle: no file is there that is not whole, and the same command makes the rest."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

pytest.importorskip("gguf")

from fsdp_qlora.__main__ import main
from fsdp_qlora.export.journal import read_journal
from tests.support import tiny
from tests.support.runs import Options, flags
from tests.support.saved_adapters import save_random_adapter
from tests.support.small_tokenizers import gpt2_tokenizer
from tests.support.torchrun import ROOT

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 448, "pad_token_id": None}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over a base of 50 MB: no instant's work."""
    base = tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE | SHAPE), tmp_path_factory.mktemp("base"))
    gpt2_tokenizer().save_pretrained(base)
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), {"model_name": base})


def killed(command: str, options: Options, is_in_the_middle: Callable[[Path], bool]) -> dict[Path, int]:
    """Kill a command once its folder looks so; return its files with the time of their last change."""
    folder = Path(str(options["output_dir"]))
    for _ in range(5):  # on a busy machine it may be through before this process is woken
        process = subprocess.Popen(
            [sys.executable, "-m", "fsdp_qlora", command, *flags(options)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not is_in_the_middle(folder):
            time.sleep(0.002)
        process.kill()
        if process.wait() < 0:
            return {file: file.stat().st_mtime_ns for file in folder.iterdir() if not file.name.startswith(".")}
        assert process.returncode == 0
        shutil.rmtree(folder)
    pytest.fail("it always ended before it was killed")


def made(command: str, options: Options) -> dict[str, bytes]:
    """Start the command; return the files of weights that it leaves."""
    assert main([command, *flags(options)]) == 0
    files = list(Path(str(options["output_dir"])).iterdir())
    assert not [file for file in files if file.name.startswith(".")]
    return {file.name: file.read_bytes() for file in files if file.suffix in (".safetensors", ".gguf")}


def test_a_killed_merge_keeps_its_whole_files_and_goes_on(adapter, tmp_path, capsys):
    asked = {"adapter": adapter, "max_shard_gb": 5e-3, "check_rows": 0}
    there = killed("merge", asked | {"output_dir": tmp_path / "m"}, lambda folder: len([*folder.glob("model-*")]) >= 2)
    shards = {file.name: at for file, at in there.items() if file.suffix == ".safetensors"}
    journal = read_journal(tmp_path / "m")
    assert journal is not None
    done = journal.done.keys()  # the kill may come between a file and its line in the journal: that file is made again
    assert done <= shards.keys()
    assert len(shards) - len(done) <= 1 <= len(done)
    assert tmp_path / "m" / "config.json" not in there, "what opens the folder is written last"
    resumed = made("merge", asked | {"output_dir": tmp_path / "m"})
    assert f"resuming  {len(done)} of {len(resumed)}" in capsys.readouterr().out
    assert len(resumed) > len(shards)
    assert all((tmp_path / "m" / name).stat().st_mtime_ns == shards[name] for name in done)
    assert resumed == made("merge", asked | {"output_dir": tmp_path / "whole"})


def test_a_killed_gguf_leaves_no_file_and_is_begun_anew(adapter, tmp_path):
    asked = {"adapter": adapter, "quantization": "q8_0"}
    there = killed(
        "gguf",
        asked | {"output_dir": tmp_path / "g"},
        lambda folder: any(part.stat().st_size > 1 << 20 for part in folder.glob(".*")),
    )
    assert not there
    assert made("gguf", asked | {"output_dir": tmp_path / "g"}) == made("gguf", asked | {"output_dir": tmp_path / "w"})
