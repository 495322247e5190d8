"""Answers to a few held-out rows after each evaluation: what the adapter says so far, beside what it is to say.

Training goes on to the same bits as without: greedy answers draw no random number, and give back the memory that they
take. Where that is not free on every rank nothing is answered, which is said once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.data.batches import Rows
from fsdp_qlora.distributed.world import World
from fsdp_qlora.generation.answers import Answers
from fsdp_qlora.generation.decoder import make_decoder
from fsdp_qlora.generation.placing import answering_bytes
from fsdp_qlora.generation.sampling import Sampling
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.budget import device_bytes
from fsdp_qlora.runtime.files import writing_to
from fsdp_qlora.units import as_gib

FILE = "eval_answers.jsonl"
SHOWN = 120  # letters of an answer that is printed


class Question(NamedTuple):
    """A held-out row: its tokens before the last answer, and that answer's."""

    row: int  # in its dataset
    prompt: list[int]
    expected: list[int]


class EvalAnswers:
    """Answers the first `count` rows that ask something. most_new: tokens of an answer. folder: of the run."""

    def __init__(
        self, model: CausalModel, rows: Rows, tokenizer: PreTrainedTokenizerBase, count: int, most_new: int,
        memory: MemoryOptions, world: World, folder: Path,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.most_new, self.memory = model, tokenizer, most_new, memory
        self.world, self.folder = world, folder
        self.questions = questions_of(rows, count)
        special = set(tokenizer.all_special_ids)
        ends = {q.expected[-1] for q in self.questions if q.expected[-1] in special}
        self.stops = sorted({int(tokenizer.eos_token_id), *ends})
        self._refused = False

    def __call__(self, step: int) -> None:
        """Answer after `step` steps, write the answers and print the first. A collective."""
        longest = max(len(question.prompt) for question in self.questions)
        if self._refused or not self._fits(longest):
            return
        with self.model.evaluating():
            decoder = make_decoder(self.model, 1, longest + self.most_new, self.world.device)
            answers = Answers(decoder, Sampling(), self.stops, self.most_new, self.world, captures=False)
            found = [answer for some in answers([q.prompt for q in self.questions]) for answer in some]
        lines = [
            {"step": step, "row": question.row, "prompt": self._text(question.prompt),
             "answer": self._text(answer.ids), "expected": self._text(question.expected)}
            for question, answer in zip(self.questions, found, strict=True)
        ]  # fmt: skip
        self.world.main_only(lambda: self._write(lines))
        first = lines[0]
        self.world.say(f"step {step}: row {first['row']} is answered {_short(first['answer'])!r} "
                       f"(right: {_short(first['expected'])!r})")  # fmt: skip

    def _fits(self, longest: int) -> bool:
        needed = answering_bytes(self.model, longest + self.most_new, longest)
        taken = torch.cuda.memory_allocated(self.world.device) if self.world.device.type == "cuda" else 0
        free = device_bytes(self.memory, self.world) - taken
        if min(least for (least,) in self.world.gather([free])) >= needed:
            return True
        self._refused = True
        self.world.say(
            f"eval_generate: no answers, as they need {as_gib(needed, 2)} of GPU memory beside training; set a lower "
            "gpu_memory_gib or context_length, or ask the saved adapter with `python -m fsdp_qlora generate`"
        )
        return False

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _write(self, lines: Sequence[dict[str, object]]) -> None:
        with writing_to(self.folder, "output_dir"), (self.folder / FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


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
        if start:
            found.append(Question(int(rows.index[number]), ids[:start], ids[start:end]))
        if len(found) == count:
            break
    return found


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}..."
