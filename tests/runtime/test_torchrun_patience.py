"""Seconds that torchrun leaves its ranks after a signal."""

import pytest
from torch.distributed.launcher.api import LaunchConfig

from fsdp_qlora.torch_compat import torchrun_patience


@pytest.mark.parametrize(("told", "seconds"), [("150", 150.0), ("", 30.0), ("soon", 30.0)])
def test_it_is_what_torchrun_was_told_where_it_can_be_told(told: str, seconds: float, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", told)
    can_be_told = "shutdown_timeout" in LaunchConfig.__dataclass_fields__
    assert torchrun_patience() == (seconds if can_be_told else 30.0)
