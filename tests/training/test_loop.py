"""The end of a loop: what is saved by all ranks together is not replaced by what one rank can save alone."""

import errno
import tempfile
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

import train
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.export import peft
from fsdp_qlora.export.peft import ADAPTER
from fsdp_qlora.memory.host_link import TRAFFIC
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.training.checkpoint import Checkpoints
from fsdp_qlora.training.loop import Loop
from fsdp_qlora.training.step import Stepper
from fsdp_qlora.units import GIB
from tests.support import tiny
from tests.support.runs import Options, flags, run_alone
from tests.support.torchrun import run_torchrun


def options(folder: Path) -> Options:
    """Four steps of a tiny model."""
    return {
        "model_name": tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE), folder / "base"),
        "dataset": tiny.save_rows(folder / "rows.jsonl", 12), "precision": "bf16", "context_length": 64,
        "lora_rank": 4, "max_steps": 4, "log_to": "stdout", "output_dir": folder / "out",
    }  # fmt: skip


def end_step_three_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the third step's passes raise, on the rank alone."""
    begin = Stepper.begin

    def begins(self: Stepper, *arguments: object) -> None:
        if self.done == 2:
            raise error
        begin(self, *arguments)

    monkeypatch.setattr(Stepper, "begin", begins)


def test_an_adapter_that_is_saved_whole_is_not_replaced_by_a_rounded_one(tmp_path, monkeypatch, capsys):
    """As the watcher of signals would do, which takes a rank for stuck whose record takes long to close."""
    loops, rescued = list[Loop](), list[str]()
    run, end, close = Loop.run, Stepper.end, Metrics.close

    def noted(self: Loop) -> int:
        loops.append(self)
        return run(self)

    def stops(self: Stepper, *arguments: object) -> object:
        record = end(self, *arguments)
        if record.step == 3:
            raise TrainingStopped("step 3: a rank has had enough")
        return record

    def closes(self: Metrics, *arguments: object, **more: object) -> None:
        monkeypatch.setattr(loops[0], "_write", lambda tensors: pytest.fail("written again"))
        rescued.append(loops[0]._rescue())
        close(self, *arguments, **more)

    for owner, name, by in ((Loop, "run", noted), (Stepper, "end", stops), (Metrics, "close", closes)):
        monkeypatch.setattr(owner, name, by)
    assert train.main(flags(options(tmp_path))) == 1
    assert rescued == [f"; the adapter as of step 3 is saved in {tmp_path / 'out'}"]
    assert "a rank has had enough. The adapter as of step 3 is saved in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/kernels/cubin"),
            "No space left on device: '/kernels/cubin'",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_the_system_refuses_in_a_step_is_one_line_and_the_adapter_is_saved(
    error, why, tmp_path, monkeypatch, capsys
):
    """As a kernel that has to be compiled in the middle of a run, and finds its cache's disk full."""
    end_step_three_with(error, monkeypatch)
    assert train.main(flags(options(tmp_path))) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert line.startswith("train.py: rank 0: the system refused what step 3 needs (")
    assert why in line
    assert f"; the adapter as of step 2 is saved in {tmp_path / 'out'}" in line
    assert any(tensor.any() for name, tensor in load_file(tmp_path / "out" / ADAPTER).items() if "lora_B" in name)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "of ours"), ValueError("of ours"), KeyError("q_proj"), AssertionError()]
)
def test_no_fault_in_a_step_loses_the_adapter(error, tmp_path, monkeypatch, capsys):
    end_step_three_with(error, monkeypatch)
    with pytest.raises(type(error)):
        train.main(flags(options(tmp_path)))
    assert f"the adapter as of step 2 is saved in {tmp_path / 'out'}" in capsys.readouterr().out
    assert (tmp_path / "out" / ADAPTER).is_file()


def test_what_stopped_a_run_is_told_also_where_nothing_can_be_saved(tmp_path, monkeypatch, capsys):
    """The disk is full, and there is no temporary folder either."""
    end_step_three_with(TrainingStopped("step 3: the loss is nan"), monkeypatch)

    def refuses(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peft, "save_file", refuses)
    monkeypatch.setattr(tempfile, "mkdtemp", refuses)
    assert train.main(flags(options(tmp_path))) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert line.startswith("train.py: step 3: the loss is nan; output_dir: the adapter could not be saved in")
    assert "No space left on device" in line


def test_copies_and_seconds_of_a_checkpoint_count_for_no_step(tmp_path, monkeypatch):
    """Through an exchange in host memory ranks copy the master weights that a checkpoint takes."""
    save, link, counted = Checkpoints.save, Stepper._link, list[float]()

    def copies(self: Checkpoints, step: int) -> Path | None:
        monkeypatch.setattr(TRAFFIC, "from_device", TRAFFIC.from_device + GIB)
        return save(self, step)

    def ends(self: Stepper, *arguments: float) -> object:
        monkeypatch.setattr(self, "_link", lambda: counted.append(link(self)[1]) or (0.0, 0.0))
        record = end(self, *arguments)
        monkeypatch.delattr(self, "_link")
        return record

    end = Stepper.end
    for owner, name, by in ((Checkpoints, "save", copies), (Stepper, "end", ends)):
        monkeypatch.setattr(owner, name, by)
    run_alone(options(tmp_path) | {"save_steps": 1}, tmp_path / "out")
    assert counted == [0.0] * 4


def test_nothing_is_the_users_mistake_once_steps_have_been_made(tmp_path, monkeypatch, capsys):
    """Exit code 2 says that nothing was trained."""
    end_step_three_with(UserError("use_cpu_offload: no memory is left to page-lock"), monkeypatch)
    assert train.main(flags(options(tmp_path))) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert line.startswith("train.py: step 3: use_cpu_offload: no memory is left")
    assert f"; the adapter as of step 2 is saved in {tmp_path / 'out'}" in line


@pytest.mark.parametrize("stops", [False, True], ids=["at the end", "after a fault"])
def test_a_peer_that_ends_before_the_adapter_is_gathered_loses_nothing(stops, tmp_path, monkeypatch, capsys):
    def gathers(self: ShardedAdapters) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ShardedAdapters, "named_tensors", gathers)
    if stops:
        end_step_three_with(TrainingStopped("step 3: the loss is nan"), monkeypatch)
        assert train.main(flags(options(tmp_path))) == 1
    else:
        with pytest.raises(RuntimeError, match="closed by peer"):
            train.main(flags(options(tmp_path)))
    captured = capsys.readouterr()
    assert ("train.py: step 3: the loss is nan; the adapter" in captured.err) == stops
    assert f"the adapter as of step {2 if stops else 4} is saved in {tmp_path / 'out'}" in captured.err + captured.out
    assert (tmp_path / "out" / ADAPTER).is_file()


def test_ctrl_c_while_some_ranks_have_begun_to_train_is_one_message(tmp_path: Path) -> None:
    """A rank that is still loading ends at once; one that trains would end its step, for which it needs the other."""
    tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE), tmp_path / "model")
    done = run_torchrun(
        """
        import os, signal, sys
        import train
        from fsdp_qlora.training import loop

        class Late(loop.Interrupt):
            def __enter__(self):
                if self.world.is_main:
                    raise KeyboardInterrupt
                entered = super().__enter__()
                os.kill(os.getpid(), signal.SIGINT)
                return entered

        loop.Interrupt = Late
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to the rank that is left
        code = train.main(sys.argv[1:])
        sys.stdout.write(f"ended with {code}\\n")
        sys.stdout.flush()
        os._exit(0)
        """,
        args=[
            "--model_name", str(tmp_path / "model"), "--dataset", "dummy", "--max_steps", "3", "--context_length",
            "32", "--lora_rank", "4", "--precision", "fp32", "--output_dir", str(tmp_path / "out"),
        ],
    )  # fmt: skip
    assert done.stdout.count("ended with 130") == 2, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ") or "rank" in line]
    assert said == ["train.py: interrupted, nothing more was saved"]


def test_a_step_that_waits_for_a_rank_is_told_once_and_goes_on(tmp_path: Path) -> None:
    tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE), tmp_path / "model")
    done = run_torchrun(
        """
        import os, sys, time
        import train
        from fsdp_qlora.training import stall, step
        from fsdp_qlora.training.checkpoint import Checkpoints

        stall.LEAST_SECONDS, stall.LOOK_SECONDS, stall.TIMES = 1.0, 0.1, 0
        end, save = step.Stepper.end, Checkpoints.save

        def late(stepper, *args):
            if stepper.updated == 2 and os.environ["RANK"] == "1":
                time.sleep(2.5)
            return end(stepper, *args)

        def long(checkpoints, step):
            time.sleep(1.5)
            return save(checkpoints, step)

        step.Stepper.end, Checkpoints.save = late, long
        train._leave(train.main(sys.argv[1:]))
        """,
        args=[
            "--model_name", str(tmp_path / "model"), "--dataset", "dummy", "--max_steps", "4", "--context_length", "32",
            "--lora_rank", "4", "--precision", "fp32", "--output_dir", str(tmp_path / "out"), "--save_steps", "2",
        ],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "has not ended" in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("rank 0: step 3 has not ended for 1 s, the longest before it took 0.")
