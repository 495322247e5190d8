"""`merge` and `gguf` on a disk that fills up: one line, no part of a file is left, and what is whole stays."""

from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("libggml")

from fsdp_qlora.__main__ import main
from fsdp_qlora.export import merged_folder
from tests.export.test_gguf import save_base
from tests.support.full_disk import REFUSED, no_file_beyond
from tests.support.runs import flags
from tests.support.saved_adapters import save_random_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_base(tmp_path_factory.mktemp("base"), "Llama")
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), {"model_name": base})


def ended(capsys: pytest.CaptureFixture[str], command: str, **options: object) -> tuple[int, str]:
    """Return the command's exit code and the last line of what it told."""
    capsys.readouterr()
    code = main([command, *flags(options)])
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]  # behind a bar that is gone
    told = [line for line in lines if line.startswith(f"{command}:")]
    assert len(told) == (code != 0), lines
    return code, "".join(told)


@pytest.mark.parametrize("more", [{"quantization": "f16"}, {"quantization": "q4_k_m"}, {"lora_only": True}], ids=str)
def test_a_gguf_file_is_whole_or_not_there(more, adapter, tmp_path, capsys):
    asked = {"adapter": adapter, "output_dir": tmp_path / "g"} | more
    with no_file_beyond(20_000):
        code, said = ended(capsys, "gguf", **asked)
    assert code == 1
    assert f"could not be written ({REFUSED}); nothing of it is left" in said
    assert not list((tmp_path / "g").iterdir())
    assert ended(capsys, "gguf", **asked) == (0, "")


def test_a_merge_keeps_its_whole_files_and_goes_on_from_them(adapter, tmp_path, capsys, monkeypatch):
    asked = {"adapter": adapter, "check_rows": 0, "max_shard_gb": 5e-5, "output_dir": tmp_path / "m"}
    write, written = merged_folder.write_shard, []

    def full_at_the_third(folder, shard, tensors, dtype):
        if len(written) < 2:
            written.append(folder / shard.file)
            return write(folder, shard, tensors, dtype)
        with no_file_beyond(shard.nbytes // 2):
            return write(folder, shard, tensors, dtype)

    with monkeypatch.context() as patched:
        patched.setattr(merged_folder, "write_shard", full_at_the_third)
        code, said = ended(capsys, "merge", **asked)
    assert code == 1
    assert f"cannot be written ({REFUSED}); free some space there and start the same command again" in said
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "m").glob("*.safetensors")}
    assert sorted(there) == written
    assert not (tmp_path / "m" / "config.json").exists()
    assert ended(capsys, "merge", **asked) == (0, "")
    assert (tmp_path / "m" / "config.json").exists()
    assert all(file.stat().st_mtime_ns == at for file, at in there.items())
