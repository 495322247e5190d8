"""The work of generate: rows read, the model loaded, answers written as they come, in order."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.atomic_files import append_lines
from fsdp_qlora.commands.answering import AnsweringOptions, sized
from fsdp_qlora.config.options import LaunchOptions
from fsdp_qlora.data.asked import Prompt, Prompts, read_prompts
from fsdp_qlora.data.sources import forget_stdin
from fsdp_qlora.distributed.world import World, open_world
from fsdp_qlora.errors import UserError
from fsdp_qlora.generation.answers import Answer, Answers
from fsdp_qlora.generation.placing import Workload
from fsdp_qlora.generation.sampling import Sampling
from fsdp_qlora.generation.stops import stops_of
from fsdp_qlora.inference import Base, Loaded, build, fit_rows, read_base, tokenizer_of
from fsdp_qlora.models.skeleton import max_positions, text_config
from fsdp_qlora.runtime.files import check_writable, writing_to
from fsdp_qlora.session import Compute, choose_compute
from fsdp_qlora.units import count_of

STDOUT = "-"


@dataclass(frozen=True)
class Ready:
    """What is to be asked of what."""

    base: Base
    compute: Compute
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    stops: list[int]

    def capacity(self, most_new: int) -> int:
        """Return the tokens of the longest row with its answer. Raises UserError where the model takes fewer."""
        longest = max(self.prompts.prompts, key=lambda prompt: len(prompt.ids))
        capacity, most = len(longest.ids) + most_new, max_positions(self.compute.hf_config)
        if most is not None and capacity > most:
            raise UserError(
                f"max_new_tokens {most_new}: the model takes at most {most} tokens, and {longest.location} asks with "
                f"{len(longest.ids)}; lower it, or leave out long rows"
            )
        return capacity

    def workload(self, capacity: int, asked: int, draws: bool = False) -> Workload:
        """Return the work that answering the prompts is. Arguments as of `Workload`."""
        lengths = [len(prompt.ids) for prompt in self.prompts.prompts]
        return Workload(capacity, max(lengths), len(lengths), asked, draws)


def answer_rows(asked: AnsweringOptions, sampling: Sampling, output: str, overwrite: bool) -> None:
    """Answer the rows of `asked` and write the answers to `output`. Raises UserError and TrainingStopped."""
    with _Lines(output) as lines, open_world(LaunchOptions(), sampling.seed) as world:
        if not asked.plan_only:
            world.main_only(lambda: lines.check(overwrite))
        with standard_input(world):
            ready = read_all(asked, world, sampling.seed)
        capacity = world.together(lambda: ready.capacity(asked.max_new_tokens))
        for line in start_lines(ready):
            world.say(line)
        work = ready.workload(capacity, asked.batch_size, not sampling.is_greedy)
        loaded = load_for(ready, work, world, asked.plan_only)
        if loaded is None:
            return
        answers = Answers(loaded.decoder(loaded.fit.rows, capacity), sampling, ready.stops, asked.max_new_tokens, world)
        world.main_only(lines.begin)
        rows = ready.prompts.prompts
        with tqdm(total=len(rows), desc="answers", unit="row", disable=None if world.is_main else True) as bar:
            for some in answers([prompt.ids for prompt in rows], [prompt.index for prompt in rows]):
                if world.is_main:
                    lines.add([record(answer, ready) for answer in some])
                bar.update(len(some))
        world.say(speed_line(answers, len(rows)))
        if output != STDOUT:
            world.say(f"answers in {output}")


@contextlib.contextmanager
def standard_input(world: World) -> Iterator[None]:
    """Let rows be read from standard input inside, by every rank and as often as it likes."""
    try:
        yield
    finally:
        if world.local_rank == 0:
            forget_stdin()


def read_all(
    asked: AnsweringOptions, world: World, seed: int, check: Callable[[Prompt], None] = lambda prompt: None
) -> Ready:
    """Read the adapter's headers, the base's config.json, its tokenizer and the rows. A collective.

    check: raises BadRow for a row that is of no use here."""
    options = asked.config(seed)
    base = world.together(lambda: read_base(asked.adapter, options.model, asked.recorded(), options))
    compute = choose_compute(base.config, world)
    hf_config = compute.hf_config
    vocabulary = text_config(hf_config).vocab_size
    tokenizer = world.first_on_node(lambda: tokenizer_of(base))
    prompts = world.first_on_node(lambda: read_prompts(options.data, tokenizer, vocabulary, check))
    return Ready(base, compute, tokenizer, prompts, stops_of(base.config.model, hf_config, prompts.stops))


def load_for(ready: Ready, work: Workload, world: World, plan_only: bool) -> Loaded | None:
    """Return the model with its weights, placed for so much work; None where that is only planned. A collective."""
    config = sized(ready.base.config, max(work.longest, work.widest))
    built = build(replace(ready.base, config=config), world, ready.compute)
    fit = fit_rows(built, work)
    world.say(f"blocks    {built.fusion}")
    world.say(fit.line)
    return None if plan_only else built.load(fit)


def record(answer: Answer, ready: Ready) -> dict[str, Any]:
    """Return an answer as its line of the file has it."""
    prompt = ready.prompts.prompts[answer.row]
    said = {"row": prompt.index, "prompt": prompt.text, "answer": text_of(answer, ready.tokenizer)}
    if prompt.answer is not None:
        said["expected"] = prompt.answer
    return said | {"tokens": len(answer.ids), "ended": "stop" if answer.is_ended else "length"}


def text_of(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return an answer's words, special tokens left out."""
    return str(tokenizer.decode(answer.ids, skip_special_tokens=True))


def speed_line(answers: Answers, rows: int, state: str = "") -> str:
    """Return how much was answered and how fast, for the user. state: of the model, where several answer."""
    seconds = max(answers.seconds, 1e-9)
    of = f" ({state})" if state else ""
    return (
        f"answered  {count_of(rows, 'row')}{of}, {count_of(answers.tokens, 'new token')} in {seconds:.1f} s: "
        f"{answers.tokens / seconds:,.1f} tokens/s"
    )


def start_lines(ready: Ready) -> list[str]:
    base, rows = ready.base, ready.prompts.prompts
    adapter = "none" if base.adapter is None else str(base.adapter.folder)
    model, tokens = base.config.model, sum(len(prompt.ids) for prompt in rows)
    return [
        f"model     {model.model_name}, {model.train_type} in {model.precision}, adapter: {adapter}",
        f"rows      {len(rows):,} of the form {ready.prompts.form}, {tokens:,} prompt tokens",
        *(f"          {note}" for note in ready.prompts.notes),
    ]


class _Lines:
    """JSON lines in a file, or on standard output, where all that is said goes to standard error meanwhile."""

    def __init__(self, output: str) -> None:
        self.path = None if output == STDOUT else Path(output)
        self._stdout = sys.stdout
        self._redirected = contextlib.redirect_stdout(sys.stderr)

    def __enter__(self) -> "_Lines":
        if self.path is None:
            self._redirected.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.path is None:
            self._redirected.__exit__(*exception)

    def check(self, overwrite: bool) -> None:
        """Raise UserError for a file that exists and shall not be replaced, and for one that cannot be written."""
        if self.path is not None and self.path.exists() and not overwrite:
            raise UserError(f"output_file: {self.path} exists; choose another file, or --overwrite true to replace it")
        if self.path is not None:
            check_writable(self.path.parent, "output_file", self.path.name)

    def begin(self) -> None:
        """Make the file, or empty it."""
        if self.path is not None:
            with writing_to(self.path.parent, "output_file"):
                self.path.write_text("")

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write lines; those that are written whole stay if the command is interrupted, or the disk full."""
        # Another encoding of standard output has not every letter, and its replacements are no JSON.
        escapes = self.path is None and (self._stdout.encoding or "").lower().replace("-", "") != "utf8"
        text = "".join(json.dumps(line, ensure_ascii=escapes) + "\n" for line in lines)
        if self.path is None:
            self._stdout.write(text)
            self._stdout.flush()
            return
        with writing_to(self.path.parent, "output_file"):
            append_lines(self.path, text)
