"""Limits of host memory and cores that containers and batch systems set, in both versions of control groups."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fsdp_qlora.runtime import control_groups
from fsdp_qlora.runtime.host_memory import available_host_bytes, total_host_bytes
from fsdp_qlora.runtime.launcher import usable_cores

V1 = "9:name=systemd:/\n4:memory:{path}\n2:cpu,cpuacct:{path}\n0::/\n"
NO_LIMIT = 9223372036854771712  # version 1's


@dataclass(frozen=True)
class Case:
    own: str  # /proc/self/cgroup
    files: Mapping[str, str] = field(default_factory=dict)  # below /sys/fs/cgroup
    free: float = float("inf")  # bytes
    cores: float = float("inf")
    total: int | None = None  # bytes, where it is looked at


def v2(limit: str, used: int, cache: int = 0, folder: str = "") -> dict[str, str]:
    stat = f"anon 7\ninactive_file {cache}\nactive_file 0\n"
    files = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {f"{folder}{name}": text for name, text in files.items()}


def v1(limit: int, used: int, cache: int = 0, folder: str = "memory/") -> dict[str, str]:
    stat = f"inactive_file 1\nactive_file 1\nrss 5\ntotal_inactive_file 0\ntotal_active_file {cache}\n"
    files = {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}
    return {f"{folder}{name}": text for name, text in files.items()}


JOB = "system.slice/slurmstepd.scope/job_7/"
CASES = {
    "no groups": Case(""),
    "a container": Case("0::/\n", v2("1000", 600, 100), 500, total=1000),
    "a container without a limit": Case("0::/\n", v2("max", 600)),
    "a container that is full": Case("0::/\n", v2("1", 9), 0),
    "a container slowed down before": Case("0::/\n", v2("1000", 600) | {"memory.high": "700\n"}, 100),
    "a job": Case(f"0::/{JOB}step_0/task_0\n", v2("max", 5, folder=f"{JOB}step_0/") | v2("900", 600, folder=JOB), 300),
    "a container, version 1": Case(V1.format(path="/docker/abc"), v1(1000, 600, 100), 500, total=1000),
    "a job, version 1": Case(
        V1.format(path="/slurm/job_7"), v1(NO_LIMIT, 9000) | v1(1000, 700, folder="memory/slurm/job_7/"), 300
    ),
    "a group of another process": Case("0::/mine\n", v2("10", 9, folder="others/") | v2("80", 9, folder="mine/"), 71),
    "outside of the mount": Case("0::/../other\n", v2("50", 9) | v2("10", 9, folder="other/"), 41),
    "cores": Case("0::/a/b\n", {"a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}, cores=2.5),
    "cores, version 1": Case(
        V1.format(path="/docker/abc"),
        {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        cores=3,
    ),
    "all cores, version 1": Case(
        V1.format(path="/"), {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_limit_above_a_process_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    for file, text in case.files.items():
        path = tmp_path / "fs" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(case.own)
    monkeypatch.setattr(control_groups, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(control_groups, "OWN", tmp_path / "own")
    assert control_groups.free_bytes() == case.free
    assert control_groups.cores() == case.cores
    assert available_host_bytes() <= case.free
    assert 1 <= usable_cores(64) <= max(1, case.cores)
    if case.total is not None:
        assert control_groups.most_bytes() == total_host_bytes() == case.total
    if case.free == float("inf"):
        assert available_host_bytes() > 1 << 20
