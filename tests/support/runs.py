"""Runs of the program as a user starts them, many in one launch of ranks, and what each left behind."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train
from tests.support.pictures import without_pictures
from tests.support.torchrun import run_torchrun

WORKER = """
    import json, sys, time
    import torch
    from tests.support.meeting import RANK, meet_at
    from tests.support.pictures import without_pictures
    from train import main

    torch.use_deterministic_algorithms(True, warn_only=True)  # and NaN in all memory that nobody has written
    for name, arguments in json.load(open(sys.argv[1])).items():
        meet_at(name)
        start = time.monotonic()
        with without_pictures():
            code = main(arguments)
        took = time.monotonic() - start
        sys.stdout.write(f"rank {RANK}: {name} ended with {code} after {took:.1f} s\\n")
    """


Options = dict[str, object]  # option -> value, as in a config file


@dataclass(frozen=True)
class Run:
    """What a finished run left in its output_dir."""

    folder: Path

    @property
    def records(self) -> list[dict]:
        """The steps."""
        return [line for line in self._lines if "loss" in line]

    @property
    def evaluations(self) -> list[dict]:
        return [line for line in self._lines if "eval_loss" in line]

    @property
    def _lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")


def run_ranks(cases: dict[str, Options], ranks: int, folder: Path, timeout: float = 200) -> dict[str, Run]:
    """Case name -> its run: `train.py` with those options on `ranks` ranks. Fails unless every case ends with 0.

    Skips on a machine whose GPUs are too few: on the CPU the numbers would not be those of the runs on a GPU beside."""
    if 0 < torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs, or none")
    # PyTorch crashes where NCCL's group is split that is not the first of its process (its issue 192106).
    apart = [n for n, case in cases.items() if "hybrid" in str(case.get("sharding_strategy"))]
    if torch.cuda.is_available() and apart and len(cases) > 1:
        launches = [{name: cases[name]} for name in apart] + [{n: c for n, c in cases.items() if n not in apart}]
        return {n: run for launch in launches if launch for n, run in run_ranks(launch, ranks, folder, timeout).items()}
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / f"{ranks}-ranks.json"
    listing.write_text(json.dumps({name: flags(case | {"output_dir": folder / name}) for name, case in cases.items()}))
    done = run_torchrun(WORKER, ranks, [str(listing)], timeout=timeout)
    for name in cases:
        for rank in range(ranks):
            assert f"rank {rank}: {name} ended with 0 " in done.stdout, f"{name}\n{done.stdout}\n{done.stderr}"
    return {name: Run(folder / name) for name in cases}


def run_alone(options: Options, folder: Path) -> Run:
    """`train.py` with those options, in this process, which is then its only rank."""
    with without_pictures():
        code = train.main(flags(options | {"output_dir": folder}))
    assert code == 0, f"{options} ended with {code}"
    return Run(folder)


def flags(options: Options) -> list[str]:
    """{"lora_rank": 8} -> ["--lora_rank", "8"]."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value).strip())]
