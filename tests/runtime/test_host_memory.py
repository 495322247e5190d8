"""What a process has freed goes back to the machine."""

import platform
import subprocess
import sys

import pytest

FREED = """
from fsdp_qlora.runtime.host_memory import give_back_freed, host_memory_gib
pieces = [bytearray(100_000) for _ in range(2000)]  # each too small for a mapping of its own
top = bytearray(100_000)
held = host_memory_gib()
pieces.clear()
freed = host_memory_gib()
give_back_freed()
print(held - freed, held - host_memory_gib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators give back by themselves")
def test_freed_memory_below_what_is_in_use_is_given_back():
    ran = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    before, after = map(float, ran.stdout.split())
    assert before < 0.1, "glibc gives it back by itself, so there is nothing to do"
    assert after > 0.15
