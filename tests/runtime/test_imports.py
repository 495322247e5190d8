"""What a run imports, and what it does not."""

import os
import subprocess
import sys

import pytest

from tests.support.torchrun import ROOT

PROGRAM = """
import sys
from fsdp_qlora.runtime.libraries import leave_out_compiler
leave_out_compiler()
import fsdp_qlora.run
from fsdp_qlora.weights.codecs.quantizers import bitsandbytes_quantizers, hqq_step
bitsandbytes_quantizers(), hqq_step()
print(sorted(name for name in sys.modules if name == "torch._inductor.compile_fx"))
"""


@pytest.mark.slow
def test_a_run_imports_no_compiler() -> None:
    """TorchInductor, by what libraries prepare when they are imported."""
    environ = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
