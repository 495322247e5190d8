"""What a run tells about itself: a progress bar or lines, one JSON line a step, a loss curve and a closing summary."""

import dataclasses
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.world import World, peer_is_gone
from fsdp_qlora.errors import first_line
from fsdp_qlora.report.callback import Callback
from fsdp_qlora.report.earlier import evaluations_in, lines_until, records_in
from fsdp_qlora.report.loggers import check_installed, open_loggers
from fsdp_qlora.report.loggers.behind import Behind
from fsdp_qlora.report.loss_curve import draw_loss_curve, is_finite, what_is_wrong
from fsdp_qlora.report.page import REPORT, write_report
from fsdp_qlora.report.parts import FILE as PARTS
from fsdp_qlora.report.parts import begin_part, end_part
from fsdp_qlora.report.progress import Bar, Lines, Pace, Progress
from fsdp_qlora.report.records import ANSWERS, STEPS, EvalRecord, StepRecord
from fsdp_qlora.report.scalars import eval_scalars, step_scalars
from fsdp_qlora.report.series import WARM_UP_STEPS
from fsdp_qlora.runtime.files import writing_to
from fsdp_qlora.units import as_time, count_of

# Steps of which a page takes 2 s of a core, and more on a busy machine: torchrun kills what takes long to end.
MOST_STEPS_IN_A_HURRY = 200_000


class Metrics(Callback):
    """Takes a `StepRecord` per step, records and shows it; every rank makes one, only rank 0 writes and prints.

    Raises UserError when a logger that was asked for is not installed or cannot start, or when `output_dir` cannot be
    written: make it before anything is loaded. A context manager, so that what was recorded survives a failure."""

    def __init__(
        self,
        config: Config,
        world: World,
        total_steps: int,
        earlier: tuple[Path, int] | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        """earlier: (folder, step) of the run that this one continues, and until where `take_over` gets its record.
        environment: what it runs on, of `machine.environment`."""
        self.config, self.world, self.total_steps, self._earlier = config, world, total_steps, earlier
        self._records: list[StepRecord] = []
        self._taken_over = 0  # of these: steps that another process did
        self._failed: StepRecord | None = None  # the step that ended the run
        self._evaluations: list[EvalRecord] = []
        self._host_peak: list[float] = []  # per rank
        self._host_peak_sum = 0.0
        self._environment = environment or {}
        self._closed = self._file_failed = False
        self._is_noted = False  # this start of the program, in the folder's environment.json
        self._loggers: list[Behind] = []
        self._progress, self._pace = list[Progress](), Pace()
        check_installed(config)
        if not world.is_main:
            return
        self.directory = Path(config.output.output_dir)
        with writing_to(self.directory, "output_dir"):
            if earlier is None:
                for name in (ANSWERS, REPORT):  # of an earlier run
                    (self.directory / name).unlink(missing_ok=True)
                begin_part(self.directory, self._environment, total_steps, None)
                self._is_noted = True
            self._file: IO[str] = (self.directory / STEPS).open("w" if earlier is None else "a", encoding="utf-8")
        self._loggers = open_loggers(config, world.say)

    def take_over(self) -> None:
        """Go on with the record of the run that this one continues: what is behind its checkpoint is cut off now."""
        if self._earlier is None or not self.world.is_main:
            return
        (folder, step), file = self._earlier, self.directory / STEPS
        with writing_to(self.directory, "output_dir"):
            lines = lines_until(folder / file.name, step)
            self._records, self._evaluations = records_in(lines), evaluations_in(lines)
            self._taken_over = len(self._records)
            with atomic_file(file) as part:  # killed here, the run it continues still has its record
                part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self._file.close()
            self._file = file.open("a", encoding="utf-8")
            answers = lines_until(folder / ANSWERS, step)
            if answers or (self.directory / ANSWERS).exists():
                with atomic_file(self.directory / ANSWERS) as part:
                    part.write_text("".join(f"{line}\n" for line in answers), encoding="utf-8")
            begin_part(self.directory, self._environment, self.total_steps, self._earlier)
            self._is_noted = True

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Note how the run ended where that is within it, before the first step. Of a run that goes on: after
        `take_over`, until which its files are those of before."""
        try:
            yield
        except BaseException as error:
            if self._is_noted:
                self._end(self._how(error))
            raise

    def on_step(self, record: StepRecord) -> None:
        """Record and show one step. The JSON line is written and flushed when this returns."""
        if not self.world.is_main:
            return
        self._records.append(record)
        self._note_host(record.host_rss_gib)
        self._note(record)
        self._pace.note(record.seconds)
        if not self._progress:
            self._progress = self._start_progress()
        for progress in self._progress:
            progress.show(record, self._records)

    def on_eval(self, record: EvalRecord) -> None:
        """Record and show one evaluation: a line of its own in metrics.jsonl, without `loss`."""
        if not self.world.is_main:
            return
        self._evaluations.append(record)
        self._write(as_json(_eval_line(record)) + "\n")
        for logger in self._loggers:
            logger.log(record.step, eval_scalars(record))
        self.world.say(f"step {record.step}: {record}; {record.rows:,} rows in {as_time(record.seconds)}")
        for progress in self._progress:
            progress.show_eval(record)

    def on_failed_step(self, record: StepRecord) -> None:
        """Record a step that ended the run: its JSON line says why in `stopped`."""
        if not self.world.is_main:
            return
        self._failed = record
        self._note(record, stopped=what_is_wrong(record))

    def _note(self, record: StepRecord, **more: str) -> None:
        line = dataclasses.asdict(record) | {"tokens_per_second": round(record.tokens_per_second, 2)} | more
        self._write(as_json(_rounded(line)) + "\n")
        for logger in self._loggers:
            logger.log(record.step, step_scalars(record))

    def _write(self, line: str) -> None:
        """Write a line of the record. Training is worth more than it: a full disk ends the record, not the run."""
        if self._file_failed:
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._file_failed = True
            self.world.say(
                f"{self.directory / 'metrics.jsonl'} cannot be written any more ({error.strerror}): training goes on "
                "without it; free some space before the end, when the adapter is saved"
            )

    def close(
        self, saved: Sequence[str | Path] = (), host_peak_gib: Sequence[float] = (), how: str = "", failed: bool = False
    ) -> None:
        """Draw the loss curve, write the report and print the summary; a second call does nothing.

        saved: what else was written, for the summary's last lines. host_peak_gib: each rank's highest reading, loading
        included, where it was kept; else the highest of the records. how: the run ended, where that was neither after
        all steps nor by early stopping. failed: an error ends it."""
        if self._closed or not self.world.is_main:
            return
        self._closed = True
        self._pace.note()
        for progress in self._progress:
            progress.close()
        for logger in self._loggers:
            logger.close(failed)
        with suppress(OSError):  # what a full disk did not take is still in the buffer; it has been told
            self._file.close()
        places = [str(place) for place in saved] + [str(self.directory / STEPS)]
        places += self._pictures(how)
        places += [logger.place for logger in self._loggers]
        self._note_host(host_peak_gib)
        for text in self._summary():
            self.world.say(text)
        for index, place in enumerate(places):
            self.world.say(f"{'saved' if index == 0 else '':<7} {place}")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        error = exception[1]
        self.close(how=self._how(error) if isinstance(error, BaseException) else "", failed=error is not None)

    def _how(self, error: BaseException) -> str:
        """Return in words how a run ended that `error` ends."""
        if isinstance(error, KeyboardInterrupt):
            return "interrupted"
        if self.world.size > 1 and isinstance(error, Exception) and peer_is_gone(error):
            return "another rank had ended"
        return first_line(error)

    def _pictures(self, how: str) -> list[str]:
        """Write what shows the run at a glance; return the files."""
        drawn = list[str]()
        if self._records or self._failed is not None:
            name, curve = self.config.model.model_name, self.directory / "loss.png"
            with self._told(curve):
                draw_loss_curve(curve, name, self._records, self._evaluations, self._failed)
                drawn.append(str(curve))
        return [*drawn, *self._end(how)]

    def _end(self, how: str) -> list[str]:
        """Note how the run ended, "" where that is by itself, and write its page; return the page's file."""
        before = 0 if self._earlier is None else self._earlier[1]
        last = self._records[-1].step if self._records else before
        with self._told(self.directory / PARTS):
            end_part(self.directory, last, how or ("finished" if last >= self.total_steps else "stopped early"))
        if not self.config.output.report:
            return []
        if how and len(self._records) > MOST_STEPS_IN_A_HURRY:
            command = f"python -m fsdp_qlora report --output_dir {shlex.quote(str(self.directory))}"
            steps = f"{len(self._records):,} steps"
            self.world.say(
                f"{self.directory / REPORT} is not written, as it takes long of {steps}; `{command}` does it"
            )
            return []
        with self._told(self.directory / REPORT):
            return [str(write_report(self.directory))]
        return []

    @contextmanager
    def _told(self, file: Path) -> Iterator[None]:
        """Say where a file could not be written, and go on, whatever was wrong: the run itself ended in its own way."""
        try:
            yield
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) else None
            self.world.say(f"{file} could not be written: {why or f'{type(error).__name__}: {first_line(error)}'}")

    def _start_progress(self) -> list[Progress]:
        """Choose and start the progress displays: at the first step, as other lines may be printed until then."""
        where, chosen = self.config.output.log_to, list[Progress]()
        if "stdout" in where:
            chosen.append(Lines(self.world.say, self.total_steps, self._pace, every_seconds=0))
        if "tqdm" in where and sys.stderr.isatty():
            chosen.append(Bar(self.total_steps, self._pace))
        elif "tqdm" in where and not chosen:
            chosen.append(Lines(self.world.say, self.total_steps, self._pace))
        return chosen

    def _speed(self) -> str:
        """Return the typical speed. The first steps compile and allocate; a run that has no others says so."""
        typical = self._records[WARM_UP_STEPS:]
        speed = statistics.median(record.tokens_per_second for record in typical or self._records)
        return f"median {speed:,.0f} tok/s {'after' if typical else 'with'} warm-up"

    def _beside_steps(self) -> list[str]:
        """Return a line where more than a hundredth of this process' time went elsewhere, and a second."""
        steps, beside = sum(record.seconds for record in self._records[self._taken_over :]), self._pace.beside
        if beside < max(1.0, steps / 100):
            return []
        evaluations = "evaluations, " if self._evaluations else ""
        return [f"        {as_time(beside)} more between steps, for {evaluations}checkpoints and the adapter"]

    def _note_host(self, per_rank: Sequence[float]) -> None:
        if not per_rank:
            return
        earlier = self._host_peak or [0.0] * len(per_rank)
        self._host_peak = [max(pair) for pair in zip(earlier, per_rank, strict=True)]
        self._host_peak_sum = max(self._host_peak_sum, sum(per_rank))

    def _evaluation_summary(self) -> str:
        last = self._evaluations[-1]
        best = next((record for record in reversed(self._evaluations) if record.is_best), None)
        text = f"loss {last.loss:.4f} at step {last.step}, perplexity {last.perplexity:.4g}"
        lowest = best is not None and best is not last
        return f"{text}; lowest {best.loss:.4f} at step {best.step}" if best is not None and lowest else text

    def _summary(self) -> list[str]:
        if not self._records:
            return ["no step was completed"]
        first, last = self._records[0], self._records[-1]
        done = f"{last.step} of " if last.step < self.total_steps else ""
        steps = done + count_of(max(last.step, self.total_steps), "step")
        left_out = sum(not is_finite(record) for record in self._records)
        lines = [
            f"trained {steps} in {as_time(sum(record.seconds for record in self._records))}, "
            f"{sum(record.tokens for record in self._records):,} tokens, {self._speed()}",
            *self._beside_steps(),
            *([f"        {left_out} of them left out: float16 gradients overflowed"] if left_out else []),
            f"loss    {first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}",
        ]
        if self._evaluations:
            lines.append(f"eval    {self._evaluation_summary()}")
        if last.gpu_allocated_gib:
            pairs = zip(last.gpu_allocated_gib, last.gpu_reserved_gib, strict=True)
            lines.append(
                "GPU     peak GiB allocated / reserved: "
                + ", ".join(f"rank {rank} {used:.2f} / {held:.2f}" for rank, (used, held) in enumerate(pairs))
            )
            mine = self._records[self._taken_over :][:1]  # counters begin with a process, and have one for each rank
            retries = [now - then for one in mine for now, then in zip(last.gpu_retries, one.gpu_retries, strict=True)]
            if any(retries):
                lines.append(
                    f"        the allocator stopped {max(retries)} times to give memory back after step "
                    f"{mine[0].step}: a --gpu_memory_gib half a GiB lower may be faster"
                )
        if self._host_peak:
            ranks = ", ".join(f"rank {rank} {gib:.2f}" for rank, gib in enumerate(self._host_peak))
            lines.append(f"host    peak GiB: {self._host_peak_sum:.2f} in all; {ranks}")
        return lines


def as_json(line: Mapping[str, Any]) -> str:
    """Return one line of JSON. The format has no NaN and no infinity: null stands for them."""
    return json.dumps({name: None if _is_wild(value) else value for name, value in line.items()}, allow_nan=False)


def _is_wild(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _eval_line(record: EvalRecord) -> dict[str, Any]:
    """Return an evaluation's line for metrics.jsonl, without the names of a step's."""
    values = dataclasses.asdict(record) | {"perplexity": record.perplexity, "seconds": round(record.seconds, 4)}
    return {name if name in ("step", "epoch") else f"eval_{name}": value for name, value in values.items()}


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    """Round GiB to a MiB and seconds to 0.1 ms; loss, lr and norm keep every digit, for runs are compared by them."""
    for name in ("gpu_allocated_gib", "gpu_reserved_gib", "host_rss_gib", "link_to_gpu_gib", "link_from_gpu_gib"):
        line[name] = [round(gib, 3) for gib in line[name]]
    return line | {"seconds": round(line["seconds"], 4)}
