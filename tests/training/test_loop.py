"""The end of a loop: what is saved by all ranks together is not replaced by what one rank can save alone."""

import pytest
import transformers

import train
from fsdp_qlora.errors import TrainingStopped
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.training.loop import Loop
from fsdp_qlora.training.step import Stepper
from tests.support import tiny
from tests.support.runs import Options, flags


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
    options: Options = {
        "model_name": tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE), tmp_path / "base"),
        "dataset": tiny.save_rows(tmp_path / "rows.jsonl", 12), "precision": "bf16", "context_length": 64,
        "lora_rank": 4, "max_steps": 4, "log_to": "stdout", "output_dir": tmp_path / "out",
    }  # fmt: skip
    assert train.main(flags(options)) == 1
    assert rescued == [f"; the adapter as of step 3 is saved in {tmp_path / 'out'}"]
    assert "a rank has had enough. The adapter as of step 3 is saved in" in capsys.readouterr().err
