"""Files of tensors written one by one: safetensors opens them, and their checksum is that of what is on the disk."""

import errno
import os
import zlib
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from fsdp_qlora.safetensors_header import NAMES, Form
from fsdp_qlora.training.checkpoint_folder import surplus
from fsdp_qlora.training.tensor_file import TensorFile, checksum


def tensors() -> dict[str, torch.Tensor]:
    values = {f"of {name}": torch.arange(12).reshape(3, 4).to(dtype) for dtype, name in NAMES.items()}
    return values | {"number": torch.tensor(3.5), "empty": torch.zeros(0), "turned": torch.randn(4, 3).T}


def test_safetensors_opens_what_was_written(tmp_path):
    written = tensors()
    file = TensorFile(tmp_path / "file", {name: Form(t.dtype, tuple(t.shape)) for name, t in written.items()})
    for name, tensor in written.items():
        file.write(name, tensor)
    nbytes, crc32 = file.close()
    content = (tmp_path / "file").read_bytes()
    assert (nbytes, crc32) == (len(content), zlib.crc32(content))
    assert checksum(tmp_path / "file") == crc32
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == written.keys()
    for name, tensor in written.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_disk_that_fails_is_an_error_in_the_end_at_the_latest(tmp_path):
    file = TensorFile(tmp_path / "file", {"a": Form(torch.float32, (3,))})
    file.write("a", torch.zeros(3))
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    with patch("os.fsync", side_effect=failure), pytest.raises(OSError, match="Input/output error"):
        file.close()
    file.abandon()


def test_an_error_of_closing_counts_and_is_none_of_a_file_that_is_given_up(tmp_path):
    for gives_up in (False, True):
        file = TensorFile(tmp_path / "file", {"a": Form(torch.float32, (3,))})
        file.write("a", torch.zeros(3))
        failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with patch.object(file, "_file", wraps=file._file) as opened:
            opened.close.side_effect = failure
            if not gives_up:
                with pytest.raises(OSError, match="No space left"):
                    file.close()
            file.abandon()
        file._file.close()


def test_the_oldest_go_but_neither_the_newest_nor_the_best():
    assert surplus([30, 10, 20], None, 30, None) == []
    assert surplus([30, 10, 20], 3, 30, None) == []
    assert surplus([30, 10, 20], 1, 30, None) == [10, 20]
    assert surplus([30, 10, 20], 2, 30, 10) == [20]
    assert surplus([30, 10, 20], 1, 30, 10) == [20]
    assert surplus([10, 90], 1, 10, None) == [90], "written just now, whatever else there is"
