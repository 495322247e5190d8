"""The command generate: answers to rows or lines of text, with an adapter or without."""

from dataclasses import dataclass

from fsdp_qlora.commands.answering import CONFLICTS, NEEDS, AnsweringOptions
from fsdp_qlora.commands.base import Command, ready_for_hub
from fsdp_qlora.config.options import Needs, command, option


@dataclass
class GenerateOptions(AnsweringOptions):
    """Generate: what answers, to what, how its tokens are chosen, and where the answers go."""

    output_file: str = option(
        "answers.jsonl",
        """File for the answers, in the order of the rows: JSON lines of row, prompt, answer, expected (the row's own
        answer, if it has one), tokens and ended. -: standard output.""",
        "in the current folder",
        is_path=True,
        known_as=("output", "out", "output_path", "save_path"),
    )
    overwrite: bool = option(
        False,
        "Replace an output_file that exists.",
        "earlier answers are not lost by accident",
        known_as=("overwrite_output_file", "force"),
    )
    temperature: float = option(
        0.0,
        "Draw tokens from probabilities flattened (above 1) or sharpened (below 1). 0: always the most likely token.",
        "the same answer each time",
        at_least=0,
    )
    top_k: int = option(
        0,
        "Draw from so many of the most likely tokens alone.",
        "top_p adapts to how sure the model is",
        at_least=1,
        special={0: "all"},
    )
    top_p: float = option(
        1.0,
        "Draw from the fewest tokens whose probabilities sum to this.",
        "the model's own probabilities",
        above=0,
        at_most=1,
        known_as=("nucleus",),
    )
    seed: int = option(
        42,
        "Seed of the drawn tokens. A row's hang on it and on the row's number alone.",
        "as of train.py",
        at_least=0,
        at_most=2**32 - 1,
        known_as=("random_seed",),
    )


def run(asked: GenerateOptions) -> None:
    """Answer, write the answers and say how fast it went."""
    ready_for_hub(asked.adapter or "", asked.model_name)
    from fsdp_qlora.commands.answer_rows import answer_rows  # torch takes seconds to import
    from fsdp_qlora.generation.sampling import Sampling

    sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.seed)
    answer_rows(asked, sampling, asked.output_file, asked.overwrite)


GENERATE = Command(
    "answers to rows or lines of text, with an adapter or without",
    command(
        "python -m fsdp_qlora generate --adapter FOLDER --dataset FILE [--option value ...]",
        """Answers prompts with a model and its adapter, many at a time, over the base as the adapter was trained:
        quantized, and on the GPUs, divided among them or streamed from host memory as it fits. Under `torchrun
        --nproc_per_node GPUS -m fsdp_qlora generate ...` the rows are divided among the GPUs.""",
        GenerateOptions,
        (
            *NEEDS,
            Needs[GenerateOptions](
                ("top_k", "top_p", "seed"), "temperature", lambda a: a.temperature > 0, "set temperature above 0"
            ),
        ),
        CONFLICTS,
    ),
    run,
    interrupted="the answers of rows that were finished are in output_file; the same command starts anew",
    ranks=True,
)
