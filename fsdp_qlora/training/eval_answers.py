"""Answers to a few held-out rows after each evaluation: what the adapter says so far, beside what it is to say.

Training goes on to the same bits as without: greedy answers draw no random number, leave rotary tables as they were,
and give back the memory that they take, which the plan has left free. Where it is not free on every rank after all, or
runs out, or the disk does, nothing is answered any more, which is said once: training is worth more.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.atomic_files import append_lines
from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.generation.answers import Answer, Answers, NoMemory, with_memory
from fsdp_qlora.generation.decoder import make_decoder
from fsdp_qlora.generation.placing import answering_bytes
from fsdp_qlora.generation.sampling import Sampling
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.budget import device_bytes
from fsdp_qlora.report.records import ANSWERS
from fsdp_qlora.training.eval_questions import Asked
from fsdp_qlora.units import as_gib, as_time, count_of

SHOWN = 120  # letters of an answer that is printed
LESS_MEMORY = "ask the saved adapter with `python -m fsdp_qlora generate`, or lower eval_generate_tokens in another run"


class EvalAnswers:
    """Answers what is asked. folder: of the run, whose `records.ANSWERS` gets the answers."""

    def __init__(
        self, model: CausalModel, asked: Asked, tokenizer: PreTrainedTokenizerBase, memory: MemoryOptions, world: World,
        folder: Path,
    ) -> None:  # fmt: skip
        self.model, self.asked, self.tokenizer, self.memory = model, asked, tokenizer, memory
        self.world, self.folder = world, folder
        self._refused = False

    def __call__(self, step: int) -> None:
        """Answer after `step` steps, write the answers and print the first. A collective."""
        if self._refused or not self._fits():
            return
        start = time.monotonic()
        try:
            found = self._answers()
        except NoMemory as stopped:
            self._refuse(str(stopped), LESS_MEMORY)
            return
        taken = time.monotonic() - start
        lines = [
            {"step": step, "row": question.row, "prompt": self._text(question.prompt),
             "answer": self._text(answer.ids), "expected": self._text(question.expected)}
            for question, answer in zip(self.asked.questions, found, strict=True)
        ]  # fmt: skip
        unwritten = self._write(lines) if self.world.is_main else ""
        if self.world.agree(lambda: bool(unwritten)):
            self._refuse(unwritten, "free some space before the end, when the adapter is saved")
            return
        first = lines[0]
        self.world.say(
            f"step {step}: row {first['row']} is answered {_short(first['answer'])!r} "
            f"(right: {_short(first['expected'])!r}); {count_of(len(lines), 'answer')} in {as_time(taken)}"
        )

    def _answers(self) -> list[Answer]:
        """Return the answers in the order of the questions. Raises NoMemory on every rank alike."""
        asked, world = self.asked, self.world
        capacity = asked.longest + asked.most_new
        with self.model.evaluating():
            decoder = with_memory(world, lambda: make_decoder(self.model, 1, capacity, world.device))
            answers = Answers(decoder, Sampling(), asked.stops, asked.most_new, world, captures=False)
            return [answer for some in answers([q.prompt for q in asked.questions]) for answer in some]

    def _fits(self) -> bool:
        needed = answering_bytes(self.model, self.asked.longest + self.asked.most_new, self.asked.longest)
        taken = torch.cuda.memory_allocated(self.world.device) if self.world.device.type == "cuda" else 0
        free = device_bytes(self.memory, self.world) - taken
        least = min(least for (least,) in self.world.gather([free]))
        if least >= needed:
            return True
        why = f"they need {as_gib(needed, 2)} of GPU memory beside training, which has left {as_gib(least, 2)}"
        self._refuse(why, LESS_MEMORY)
        return False

    def _refuse(self, why: str, remedy: str) -> None:
        """Answer nothing from now on. On every rank."""
        self._refused = True
        self.world.say(f"eval_generate: no more answers, as {why}; training goes on; {remedy}")

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _write(self, lines: Sequence[dict[str, object]]) -> str:
        """Return why the lines could not be written, "" where they are."""
        try:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            append_lines(self.folder / ANSWERS, text)
        except OSError as error:
            return f"{self.folder / ANSWERS} cannot be written ({error.strerror})"
        return ""


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}..."
