"""Fine-tune a language model with LoRA over a frozen 4-bit base: `torchrun --nproc_per_node 2 train.py --model_name ...`.

This file is the door: it reads the options, so that a mistake is told before PyTorch is even imported, runs the run
(`fsdp_qlora/run.py`, one line per stage) and turns how it ended into one line and an exit code: 0, 2 for a mistake of
the user's, 1 for a run that stopped in the middle, 130 and 143 for one that a signal ended.
"""

import sys
from collections.abc import Sequence

from fsdp_qlora.config_parse import parse
from fsdp_qlora.environment import rank_from_environment
from fsdp_qlora.errors import TrainingStopped, UserError


def main(arguments: Sequence[str]) -> int:
    try:
        config = parse(arguments)
        from fsdp_qlora.run import run  # seconds of imports, which a typo in an option must not wait for

        return run(config)
    except UserError as error:
        if rank_from_environment() == 0:  # every rank meets the same mistake
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 2
    except TrainingStopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
