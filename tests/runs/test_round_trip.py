"""A real model after training: merged, as GGUF and as an adapter's file, it answers as base + adapter.

SmolLM2 learns the quickstart's task over a 4-bit base. Its forms are asked the quickstart's held-out questions, folders
by `evaluate` and files by llama.cpp's server. docs/export.md has the figures of all forms.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

gguf = pytest.importorskip("gguf")
pytest.importorskip("libggml")
pytest.importorskip("xllamacpp")

from fsdp_qlora.__main__ import main  # noqa: E402
from fsdp_qlora.export.gguf.families import LLAMA, heads_permuted, permuted  # noqa: E402
from tests.support import plain  # noqa: E402
from tests.support.llama_server import server_answers  # noqa: E402
from tests.support.runs import flags, run_alone  # noqa: E402
from tests.support.torchrun import ROOT  # noqa: E402

SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
DATA = ROOT / "launch" / "quickstart_data"
ROWS = [json.loads(line)["messages"] for line in (DATA / "heldout.jsonl").read_text().splitlines()[:12]]
RIGHT = [row[-1]["content"] for row in ROWS]
MARK = 11  # right answers of 12
MOST_TOKENS = 24  # of an answer, as in the quickstart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread_throughout"),
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"no {SMOLLM2.name}: see launch/get_smollm2.py"),
]


class Forms:
    """A trained adapter and the forms that it takes, each made by its command when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = {
            "model_name": SMOLLM2, "dataset": DATA / "train.jsonl", "precision": "fp32", "context_length": 64,
            "lora_rank": 16, "lora_alpha": 32, "batch_size": 6, "max_steps": 12, "lr": 2e-3, "log_to": "stdout",
            "use_gradient_checkpointing": False,
        }  # fmt: skip
        self.adapter = run_alone(options, folder / "adapter").folder
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))

    def merged(self, base: str) -> Path:
        """The folder that transformers opens, in float32."""
        return self._made("merge", base, adapter=self.adapter, merge_base=base, dtype="fp32", check_rows=0)

    def file(self, name: str, **options: object) -> Path:
        """A GGUF file."""
        return next(self._made("gguf", name, **options).glob("*.gguf"))

    def evaluated(self, name: str, **model: object) -> list[str]:
        """Answers by `evaluate`, beside what they are compared with."""
        asked = {"dataset": self.rows, "measures": "exact", "max_new_tokens": MOST_TOKENS}
        out = self._made("evaluate", name, base_too=False, **asked, **model)
        return [json.loads(line)["answer"] for line in (out / "answers.jsonl").read_text().splitlines()]

    def _made(self, command: str, name: str, **options: object) -> Path:
        out = self.folder / command / name
        if not out.exists():
            assert main([command, *flags({"output_dir": out} | options)]) == 0
        return out


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory, one_thread_throughout: None) -> Forms:
    return Forms(tmp_path_factory.mktemp("forms"))


def served(file: Path, lora: Path | None = None, rows: int = len(ROWS)) -> list[str]:
    said = server_answers(file, [row[:-1] for row in ROWS[:rows]], MOST_TOKENS, lora)
    assert [answer.prompt_tokens for answer in said] == prompt_lengths()[:rows]
    return [answer.text for answer in said]


def by_transformers(folder: Path, rows: int) -> list[str]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for row in ROWS[:rows]:
        asked = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_tensors="pt")
        found = model.generate(**asked, max_new_tokens=MOST_TOKENS, do_sample=False)[0, asked["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(found, skip_special_tokens=True))
    return answers


def prompt_lengths() -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    return [len(tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True)["input_ids"]) for row in ROWS]


def right(answers: list[str]) -> int:
    count = sum(answer.split() == wanted.split() for answer, wanted in zip(answers, RIGHT, strict=False))
    print(f"{count} of {len(answers)} right")
    return count


def logits(model: PreTrainedModel | PeftModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def read_back(file: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(file).tensors
    }


CONFIG = AutoConfig.from_pretrained(SMOLLM2) if SMOLLM2.is_dir() else LlamaConfig()
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)


def in_gguf(name: str) -> tuple[str, int]:
    """Return llama.cpp's name of a weight, and the number of heads whose rows it has in another order, or 0."""
    return NAMES.get_name(name, (".weight",)), heads_permuted(name, LLAMA, CONFIG)


@pytest.mark.parametrize("base", ["trained", "original"])
def test_a_merged_folder_has_the_logits_of_base_plus_adapter(base, forms):
    ids = AutoTokenizer.from_pretrained(SMOLLM2).apply_chat_template(ROWS[0], return_tensors="pt")["input_ids"]
    model = plain.load_base(SMOLLM2, plain.Recipe(quantized=base == "trained"))
    before = logits(model, ids)
    truth = logits(PeftModel.from_pretrained(model, forms.adapter), ids)
    error = (logits(AutoModelForCausalLM.from_pretrained(forms.merged(base)), ids) - truth).abs().max()
    print(f"{base}: {error:.1e} of {(truth - before).abs().max():.1f}")
    assert (truth - before).abs().max() > 1
    assert error < 1e-3


def test_what_loses_nothing_answers_as_base_plus_adapter(forms):
    answers = forms.evaluated("adapter", adapter=forms.adapter)
    assert right(answers) >= MARK
    merged = {"model_name": forms.merged("trained"), "train_type": "lora", "precision": "fp32"}
    assert forms.evaluated("merged", **merged) == answers
    assert by_transformers(forms.merged("trained"), 5) == answers[:5]
    assert served(forms.file("f16", adapter=forms.adapter, quantization="f16")) == answers


@pytest.mark.parametrize(("quantization", "most_error", "least"), [("q8_0", 0.01, MARK), ("q4_k_m", 0.08, MARK - 2)])
def test_a_quantized_file_reads_back_as_the_merged_weights_and_answers(quantization, most_error, least, forms):
    truth = {}
    for name, tensor in load_file(forms.merged("trained") / "model.safetensors").items():
        found_name, heads = in_gguf(name)
        truth[found_name] = permuted(tensor, heads) if heads else tensor
    file = forms.file(quantization, adapter=forms.adapter, quantization=quantization)
    found = read_back(file)
    assert found.keys() == truth.keys()
    for name, tensor in found.items():
        assert (tensor - truth[name]).norm() <= most_error * truth[name].norm(), name
    assert not torch.equal(found["blk.0.ffn_up.weight"], truth["blk.0.ffn_up.weight"])
    assert right(served(file)) >= least


def test_the_adapter_alone_over_the_bases_file_answers_as_merged_over_the_original(forms):
    alone = forms.file("lora", adapter=forms.adapter, lora_only=True)
    found = read_back(alone)
    for name, tensor in load_file(forms.adapter / "adapter_model.safetensors").items():
        linear, which = name.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        weight, heads = in_gguf(f"{linear}.weight")
        wanted = permuted(tensor, heads) if heads and which == "B" else tensor
        assert torch.equal(found.pop(f"{weight}.lora_{which.lower()}"), wanted.half().float()), name
    assert not found
    base = forms.file("base", model_name=SMOLLM2, quantization="f16")
    merged = {"model_name": forms.merged("original"), "train_type": "lora", "precision": "fp32"}
    answers = forms.evaluated("original", **merged)
    assert right(answers) >= MARK - 2
    assert served(base, alone) == answers
    assert right(served(base, rows=5)) == 0
