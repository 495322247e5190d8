"""The work of evaluate: rows measured with the adapter and without it, the figures as a record and as a table."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.commands.answer_rows import (
    Ready,
    load_for,
    read_all,
    record,
    speed_line,
    standard_input,
    start_lines,
    text_of,
)
from fsdp_qlora.commands.evaluate import EvaluateOptions
from fsdp_qlora.commands.evaluate_task import Task, check_row, task_of
from fsdp_qlora.config.options import LaunchOptions
from fsdp_qlora.distributed.world import World, open_world
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.generation.answers import Answer, Answers
from fsdp_qlora.generation.decoder import FusedDecoder, GenericDecoder
from fsdp_qlora.generation.likelihood import row_losses
from fsdp_qlora.generation.sampling import Sampling
from fsdp_qlora.generation.scores import NORMALIZE, Loss, Share, best, mean_loss, sign_test
from fsdp_qlora.inference import Loaded
from fsdp_qlora.runtime.files import check_writable, writing_to

FILE, ANSWERS, BASE_ANSWERS = "evaluation.json", "answers.jsonl", "answers_base.jsonl"


@dataclass
class Measured:
    """The figures of one state of the model. right: of exact, of each row."""

    loss: Loss | None = None
    exact: Share | None = None
    choice: Share | None = None
    choice_per_token: Share | None = None
    right: list[bool] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        made = {} if self.loss is None else self.loss.record()
        for name in ("exact", "choice", "choice_per_token"):
            share = getattr(self, name)
            made |= {} if share is None else {name: share.record()}
        return made

    def cells(self) -> dict[str, str]:
        """Return measure -> its figure, for the table."""
        found = {name: str(getattr(self, name)) for name in ("loss", "exact", "choice", "choice_per_token")}
        found = {name: text for name, text in found.items() if text != "None"}
        if self.loss is not None:
            perplexity = self.loss.perplexity
            found["perplexity"] = f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.4g}"
        return found


def evaluate_rows(asked: EvaluateOptions) -> None:
    """Measure what `asked` wants. Raises UserError, and TrainingStopped where fewer rows are right than asked for."""
    folder = Path(asked.output_dir)
    with open_world(LaunchOptions(), 42) as world:
        if not asked.plan_only:
            world.main_only(lambda: _check_output(folder, asked.overwrite_output_dir))
        with standard_input(world):
            ready = read_all(asked, world, 42, partial(check_row, asked.measures))
            task = world.together(lambda: task_of(asked, ready, world))
        work = world.together(lambda: task.workload(asked, ready))
        for line in start_lines(ready):
            world.say(line)
        world.say(f"measures  {', '.join(task.measures)}")
        loaded = load_for(ready, work, world, asked.plan_only)
        if loaded is None:
            return
        decoder = loaded.decoder(loaded.fit.rows, work.capacity) if "exact" in task.measures else None
        states = {"adapter": True} if ready.base.adapter is not None else {}
        states |= {"base": False} if asked.base_too or not states else {}
        found = {}
        for name, is_on in states.items():
            world.together(partial(loaded.set_adapter, is_on))
            found[name] = _measure(name, asked, ready, task, loaded, decoder, world)
        for line in _shown(asked, ready, found):
            world.say(line)  # before a disk can refuse them
        world.main_only(lambda: _write(folder, asked, ready, task, found))
        world.say(f"figures in {folder / FILE}")
        first = next(iter(found.values()))
        if asked.at_least is not None and first.exact is not None and first.exact.share < asked.at_least:
            raise TrainingStopped(
                f"at_least: {first.exact.share:.1%} of the rows are right, and {asked.at_least:.1%} were to be"
            ).on_every_rank(world.rank)


def _measure(
    state: str,
    asked: EvaluateOptions,
    ready: Ready,
    task: Task,
    loaded: Loaded,
    decoder: FusedDecoder | GenericDecoder | None,
    world: World,
) -> Measured:
    """Return the figures of the model as it is now. A collective."""
    made, prompts = Measured(), ready.prompts.prompts
    if task.rows is not None:
        made.loss = mean_loss(row_losses(loaded.model, task.rows, task.most_tokens, world))
    if task.choice_rows is not None:
        losses = row_losses(loaded.model, task.choice_rows, task.most_tokens, world)
        edge, right = 0, {False: 0, True: 0}
        for count, which in task.choices:
            for per_token in right:
                right[per_token] += best(losses[edge : edge + count], per_token) == which
            edge += count
        made.choice, made.choice_per_token = (Share(right[per], len(task.choices)) for per in (False, True))
    if decoder is not None:
        decoder.forget_adapters()
        answers = Answers(decoder, Sampling(), ready.stops, asked.max_new_tokens, world)
        made.answers = [answer for some in answers([prompt.ids for prompt in prompts]) for answer in some]
        world.say(speed_line(answers, len(prompts), state))
        made.right = [
            is_right(answer, prompt.answer or "", ready.tokenizer, NORMALIZE[asked.normalize])
            for answer, prompt in zip(made.answers, prompts, strict=True)
        ]
        made.exact = Share(sum(made.right), len(prompts))
    return made


def is_right(
    answer: Answer, expected: str, tokenizer: PreTrainedTokenizerBase, normalize: Callable[[str], str]
) -> bool:
    """Return whether an answer is the expected one, which may have special tokens in its text, as calls of tools do."""
    said = (tokenizer.decode(answer.ids, skip_special_tokens=skips) for skips in (True, False))
    return normalize(expected) in [normalize(str(text)) for text in said]


def _record(asked: EvaluateOptions, ready: Ready, task: Task, found: dict[str, Measured]) -> dict[str, Any]:
    base, model = ready.base, ready.base.config.model
    made: dict[str, Any] = {
        "model_name": model.model_name, "revision": model.revision, "train_type": model.train_type,
        "precision": model.precision, "adapter_folder": None if base.adapter is None else str(base.adapter.folder),
        "dataset": asked.dataset, "rows": len(ready.prompts.prompts), "measures": task.measures,
    }  # fmt: skip
    if "exact" in task.measures:
        made |= {"normalize": asked.normalize, "max_new_tokens": asked.max_new_tokens}
    made |= {name: measured.record() for name, measured in found.items()}
    if len(found) == 2 and "exact" in task.measures:
        pairs = list(zip(found["adapter"].right, found["base"].right, strict=True))
        gained, lost = pairs.count((True, False)), pairs.count((False, True))
        made["exact_compared"] = {"only_adapter": gained, "only_base": lost, "p": sign_test(gained, lost)}
    return made


def _write(folder: Path, asked: EvaluateOptions, ready: Ready, task: Task, found: dict[str, Measured]) -> None:
    names = {"adapter": ANSWERS, "base": BASE_ANSWERS if "adapter" in found else ANSWERS}
    with writing_to(folder, "output_dir"):
        for name, measured in found.items():
            if measured.answers:
                with atomic_file(folder / names[name]) as part, part.open("w", encoding="utf-8") as file:
                    for answer, right in zip(measured.answers, measured.right, strict=True):
                        file.write(json.dumps(record(answer, ready) | {"right": right}, ensure_ascii=False) + "\n")
        if (folder / FILE).exists():  # of an earlier evaluation, whose answers are not of these figures
            for name in {ANSWERS, BASE_ANSWERS} - {names[name] for name, one in found.items() if one.answers}:
                (folder / name).unlink(missing_ok=True)
        with atomic_file(folder / FILE) as part:
            part.write_text(json.dumps(_record(asked, ready, task, found), indent=1, allow_nan=False) + "\n")


def _shown(asked: EvaluateOptions, ready: Ready, found: dict[str, Measured]) -> list[str]:
    """Return some answers and the table, for the user."""
    lines = []
    for i, prompt in enumerate(ready.prompts.prompts[: asked.show_answers]):
        texts = {name: text_of(one.answers[i], ready.tokenizer) for name, one in found.items() if one.answers}
        said = {name: " ".join(text.split()) for name, text in texts.items()}
        if said:
            lines += ["", f"asked:    {_asked(prompt.row) or prompt.text}", f"right:    {prompt.answer}"]
            lines += [f"{name + ':':<9} {text}" for name, text in said.items()]
    return [*lines, "", *table({name: measured.cells() for name, measured in found.items()}), ""]


def _asked(row: Any) -> str:
    """Return the words of a conversation's last question."""
    turns = [turn for turn in row.get("messages") or [] if isinstance(turn, dict) and turn.get("role") == "user"]
    return str(turns[-1].get("content")) if turns else ""


def table(columns: dict[str, dict[str, str]]) -> list[str]:
    """Return lines of a table: a row for each measure, a column for each state."""
    rows = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    lines: list[Sequence[str]] = [("", *columns), *((row, *(c.get(row, "") for c in columns.values())) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _check_output(folder: Path, overwrite: bool) -> None:
    if (folder / FILE).exists() and not overwrite:
        raise UserError(f"output_dir: {folder / FILE} exists; choose another folder, or --overwrite_output_dir true")
    check_writable(folder, "output_dir")
