"""Another program on the card: takes GPU memory in the middle of a run and holds it, to see the run give way.

    python benchmarks/foreign.py --leave_gib 24.5 --gib 1 --run out --step 3 &
    torchrun --nproc_per_node 1 train.py --output_dir out ...

On a card larger than the one that is meant, `--leave_gib` first takes all but that much, before the run plans: give the
run no --gpu_memory_gib then, which would leave the rest of the card unused. When `out/metrics.jsonl` has `--step` lines
(or `--seconds` after the start) it takes `--gib` GiB more, piece by piece as they become free, as nothing gives memory
to a program on a full card but another that lets it go. It holds them until it is ended, or for `--hold` seconds.
Start one for each card, with CUDA_VISIBLE_DEVICES. "ready" is printed when the run may start.
"""

import argparse
import time
from pathlib import Path

import torch

GIB, PIECE = 1 << 30, 32 << 20  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--leave_gib", type=float, default=None, help="taken at once: all but this")
    parser.add_argument("--run", type=Path, default=None, help="output_dir of the run that is watched")
    parser.add_argument("--step", type=int, default=3, help="steps that the run has recorded by then")
    parser.add_argument("--seconds", type=float, default=0.0, help="after the start, where no run is watched")
    parser.add_argument("--hold", type=float, default=3600.0, help="seconds")
    asked = parser.parse_args()
    torch.zeros(1, device="cuda")  # the context, whose half a GiB is none of what is taken in the middle
    held = []
    if asked.leave_gib is not None:
        held = take(torch.cuda.mem_get_info()[0] - asked.leave_gib * GIB)
    say("ready")
    start = time.monotonic()
    while steps_of(asked.run) < asked.step if asked.run is not None else time.monotonic() < start + asked.seconds:
        time.sleep(0.05)
    held += take(asked.gib * GIB)
    time.sleep(asked.hold)


def take(nbytes: float) -> list[torch.Tensor]:
    """So much of the card, as it becomes free."""
    held: list[torch.Tensor] = []
    waited = False
    while len(held) * PIECE < nbytes:
        try:
            held.append(torch.empty(PIECE, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            if not waited:
                say(f"has {len(held) * PIECE / GIB:.2f} GiB and waits for the rest")
            waited = True
            time.sleep(0.02)
    say(f"took {len(held) * PIECE / GIB:.2f} GiB; {torch.cuda.mem_get_info()[0] / GIB:.2f} GiB are free")
    return held


def steps_of(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count("\n")
    except OSError:
        return 0


def say(text: str) -> None:
    print(f"foreign: {text}", flush=True)


if __name__ == "__main__":
    main()
