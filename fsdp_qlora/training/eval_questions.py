"""What is asked of held-out rows after each evaluation, checked before the run is planned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fsdp_qlora.config.options import Config
from fsdp_qlora.data.asked import stop_ids
from fsdp_qlora.data.batches import Rows
from fsdp_qlora.errors import UserError
from fsdp_qlora.generation.placing import answering_bytes
from fsdp_qlora.generation.stops import stops_of
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.skeleton import max_positions


class Question(NamedTuple):
    """A held-out row: its tokens before the last answer, and that answer's."""

    row: int  # in its dataset
    prompt: list[int]
    expected: list[int]


@dataclass(frozen=True)
class Asked:
    """The questions of a run. stops: tokens that end an answer, as `generate` has them. most_new: tokens of one."""

    questions: list[Question]
    stops: list[int]
    most_new: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(question.prompt) for question in self.questions)


def asked_of(
    config: Config, held_out: Rows | None, tokenizer: PreTrainedTokenizerBase | None, hf_config: PretrainedConfig
) -> Asked | None:
    """Return what `config` wants to be answered, None for nothing.

    Raises UserError where no row asks anything, and where the model takes fewer tokens than a row with its answer."""
    count, most_new = config.evaluation.eval_generate, config.evaluation.eval_generate_tokens
    if not count or held_out is None:
        return None
    questions = [] if tokenizer is None else questions_of(held_out, count)
    if not questions or tokenizer is None:
        raise UserError(
            f"eval_generate {count}: has no effect, as no held-out row asks anything before its answer; omit it"
        )
    longest = max(questions, key=lambda question: len(question.prompt))
    tokens, most = len(longest.prompt) + most_new, max_positions(hf_config)
    if most is not None and tokens > most:
        raise UserError(
            f"eval_generate_tokens {most_new}: the model takes at most {most} tokens, and held-out row {longest.row} "
            f"asks with {len(longest.prompt)}; lower it, or leave out long rows"
        )
    stops = stops_of(config.model, hf_config, stop_ids(config.data, held_out.form, tokenizer))
    return Asked(questions, stops, most_new)


def memory_of(config: Config, asked: Asked | None) -> Callable[[CausalModel], int]:
    """Return what gives the bytes of a device that answers take beside training.

    asked: None where the rows are not read: prompts are taken to fill the context then."""

    def nbytes(model: CausalModel) -> int:
        if not config.evaluation.eval_generate:
            return 0
        longest = config.data.context_length if asked is None else asked.longest
        return answering_bytes(model, longest + config.evaluation.eval_generate_tokens, longest)

    return nbytes


def questions_of(rows: Rows, count: int) -> list[Question]:
    """Return the first rows that ask something before their last answer; at most `count`."""
    found: list[Question] = []
    for number in range(len(rows)):
        part = slice(int(rows.offsets[number]), int(rows.offsets[number + 1]))
        ids, trains = rows.ids[part].tolist(), rows.trains[part].tolist()
        end = len(trains) - trains[::-1].index(True)
        start = end
        while start > 0 and trains[start - 1]:
            start -= 1
        if start > 1:  # the first token is never learnt, as nothing predicts it: alone it asks nothing
            found.append(Question(int(rows.index[number]), ids[:start], ids[start:end]))
        if len(found) == count:
            break
    return found
