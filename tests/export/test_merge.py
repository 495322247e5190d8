"""A merged model is base + adapter: of PEFT, of bitsandbytes' dequantized base, and for transformers that opens it."""

import copy
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from fsdp_qlora import __main__
from fsdp_qlora.__main__ import main
from fsdp_qlora.commands.base import Command
from fsdp_qlora.commands.merge import MERGE
from fsdp_qlora.export import merged_folder
from fsdp_qlora.weights.checkpoint import Checkpoint
from tests.support import plain, tiny
from tests.support.runs import Options, flags, run_alone
from tests.support.saved_adapters import save_random_adapter

# Rows of whole quantization blocks: bitsandbytes' dequantization on the CPU takes no others.
SHAPE = tiny.SHAPE | {"intermediate_size": 192}
IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140]])
TIED = {"head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, dict] = {
    "Llama": {},
    "Qwen2": {},  # biases
    "Phi3": {},  # q, k, v in one, gate and up in one
    "Gemma2": TIED | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = getattr(transformers, f"{request.param}Config")(**SHAPE | FAMILIES[request.param])
    return tiny.save_model(config, tmp_path_factory.mktemp(request.param), torch.bfloat16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(transformers.LlamaConfig(**SHAPE), tmp_path_factory.mktemp("llama"), torch.bfloat16)


def merge(capsys: pytest.CaptureFixture[str], code: int = 0, **options: object) -> str:
    """What the command says: on stdout where it ends well, else its one line on stderr."""
    capsys.readouterr()
    assert main(["merge", *flags(options)]) == code
    said = capsys.readouterr()
    if code:
        lines = [line for line in said.err.splitlines() if line.strip() and not line.startswith("merging:")]
        assert len(lines) == 1, said.err
    return said.err if code else said.out


def dequantized(model: PreTrainedModel, double_quant: bool, dtype: torch.dtype) -> None:
    """Give the linears of the decoder layers the numbers that bitsandbytes' 4-bit weights are."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            codes, state = quantize_4bit(
                module.weight.data.bfloat16(), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
            )
            state.dtype = dtype
            module.weight.data = dequantize_4bit(codes, state).to(module.weight.dtype)


def with_peft(base: Path, adapter: Path, quantized: bool, double_quant: bool = True) -> PreTrainedModel:
    """Base + adapter as PEFT merges them, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if quantized:
        dequantized(model, double_quant, torch.bfloat16)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def logits(folder_or_model: Path | PreTrainedModel) -> Tensor:
    model = folder_or_model
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("double_quant", ["true", "false"])
def test_merged_in_float32_is_bitsandbytes_base_plus_adapter(base, double_quant, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base, "double_quant": double_quant})
    merge(capsys, adapter=adapter, output_dir=tmp_path / "m", dtype="fp32", check_rows=0)
    theirs = with_peft(base, adapter, quantized=True, double_quant=double_quant == "true")
    state, plain = theirs.state_dict(), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    ours = tensors_of(tmp_path / "m")
    moved = 0
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)
        moved += not torch.equal(tensor, plain[name])
    assert moved == len([name for name in ours if "_proj.weight" in name])
    torch.testing.assert_close(logits(tmp_path / "m"), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_merged_in_bf16_is_rounded_once_and_what_it_moved_is_said(base, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base}, size=0.005)
    said = merge(capsys, adapter=adapter, output_dir=tmp_path / "m", check_rows=4)
    exact = with_peft(base, adapter, quantized=True)
    wrong = total = 0
    for name, tensor in tensors_of(tmp_path / "m").items():
        assert tensor.dtype == torch.bfloat16
        wrong, total = wrong + int((tensor != exact.state_dict()[name].bfloat16()).sum()), total + tensor.numel()
    assert wrong < total / 1000  # the order of a float32 sum

    told = json.loads((tmp_path / "m" / "merge.json").read_text())["report"]
    assert f"at most {told['merged']:.3g} from those of base + adapter" in said
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dequantized(before, True, torch.bfloat16)
    rounded = copy.deepcopy(exact)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    merged = learnt = once = 0.0
    for text in merged_texts():
        ids = torch.tensor([tokenizer(text)["input_ids"][:128]])
        with torch.no_grad():
            truth = exact(ids).logits
            moved = [(model(ids).logits - truth).abs().max().item() for model in (saved, before, rounded)]
        merged, learnt, once = (max(pair) for pair in zip((merged, learnt, once), moved, strict=True))
    assert told["merged"] == pytest.approx(merged, rel=1e-2)
    assert told["learnt"] == pytest.approx(learnt, rel=1e-2)
    assert 0 < merged <= 2 * once
    assert merged < learnt


def merged_texts() -> tuple[str, ...]:
    from fsdp_qlora.export.check_rows import TEXTS

    return TEXTS


def test_original_is_the_checkpoints_own_weights_plus_adapter(llama, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama, "use_rslora": True})
    merge(capsys, adapter=adapter, output_dir=tmp_path / "m", merge_base="original", dtype="fp32", check_rows=0)
    state = with_peft(llama, adapter, quantized=False).state_dict()
    for name, tensor in tensors_of(tmp_path / "m").items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)


def test_a_base_that_is_published_in_4_bits_is_dequantized_as_it_is(llama, tmp_path, capsys):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, device_map=str(plain.DEVICE), quantization_config=settings
    )
    theirs.save_pretrained(tmp_path / "4bit")
    tiny.save_tokenizer(tmp_path / "4bit")
    adapter = save_random_adapter(tmp_path / "a", {"model_name": tmp_path / "4bit", "double_quant": "false"})
    asked = {"adapter": adapter, "output_dir": tmp_path / "m", "dtype": "fp32"}
    assert "is published quantized; use --merge_base trained" in merge(capsys, 2, **asked, merge_base="original")
    merge(capsys, **asked)
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            weight = model.get_submodule(name).weight
            weight.data = plain.decoded(module).view_as(weight).float().cpu()
    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    torch.testing.assert_close(logits(tmp_path / "m"), logits(theirs), rtol=1e-5, atol=1e-5)


def test_the_text_part_of_a_vision_language_model_is_merged_and_the_rest_kept(tmp_path, capsys):
    text = SHAPE | TIED | {"sliding_window": 16, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=260, boi_token_index=261,
        eoi_token_index=262,
    )  # fmt: skip
    base = tiny.save_model(config, tmp_path / "b", torch.bfloat16)
    (base / "preprocessor_config.json").write_text('{"image_size": 28}')
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base, "train_type": "lora"})
    merge(capsys, adapter=adapter, output_dir=tmp_path / "m", dtype="fp32")
    assert (tmp_path / "m" / "preprocessor_config.json").read_text() == '{"image_size": 28}'
    theirs = PeftModel.from_pretrained(
        transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), adapter
    ).merge_and_unload()
    ours = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    assert ours.dtype == torch.float32
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_run_merges_as_it_answers_and_opens_with_its_tokenizer(llama, tmp_path, capsys):
    rows = tiny.save_rows(tmp_path / "rows.jsonl", 8)
    options: Options = {
        "model_name": llama, "dataset": rows, "train_type": "lora", "precision": "fp32", "batch_size": 4,
        "context_length": 32, "lora_rank": 4, "lr": 1e-2, "log_to": "stdout",
    }  # fmt: skip
    adapter = run_alone(options, tmp_path / "a").folder
    said = merge(capsys, adapter=adapter, output_dir=tmp_path / "m")
    assert f"4 rows of {rows}" in said
    torch.testing.assert_close(
        logits(tmp_path / "m"), logits(with_peft(llama, adapter, quantized=False)), rtol=1e-5, atol=1e-5
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("ant")["input_ids"][0] == 1
    assert (tmp_path / "m" / "generation_config.json").is_file()


def test_an_adapter_of_peft_alone_needs_to_be_told_how_its_base_was_stored(llama, tmp_path, capsys):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=3, target_modules=["q_proj", "down_proj", "lm_head"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "a")
    asked = {"adapter": tmp_path / "a", "output_dir": tmp_path / "m", "dtype": "fp32", "check_rows": 1}
    said = merge(capsys, 2, **asked)
    assert "add --train_type, --precision as it was trained, or --merge_base original" in said
    assert "add --double_quant" in merge(capsys, 2, **asked, train_type="qlora", precision="bf16")
    assert not (tmp_path / "m").exists()
    merge(capsys, **asked, train_type="qlora", precision="bf16", double_quant="true")
    state = with_peft(llama, tmp_path / "a", quantized=True).state_dict()
    for name, tensor in tensors_of(tmp_path / "m").items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)


def test_an_interrupted_merge_goes_on_from_its_last_whole_file(llama, tmp_path, capsys, monkeypatch):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    asked = {"adapter": adapter, "check_rows": 0, "max_shard_gb": 5e-5}
    merge(capsys, **asked, output_dir=tmp_path / "whole")
    write, written = merged_folder.write_shard, []

    def until_the_third(folder, shard, tensors, dtype):
        if len(written) == 2:
            next(iter(tensors))
            (folder / f".{shard.file}.1").write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(shard.file)
        write(folder, shard, tensors, dtype)

    monkeypatch.setattr(merged_folder, "write_shard", until_the_third)
    assert main(["merge", *flags(asked | {"output_dir": tmp_path / "m"})]) == 130
    assert not (tmp_path / "m" / "config.json").exists()
    first = [(tmp_path / "m" / name).stat().st_mtime_ns for name in written]
    monkeypatch.setattr(merged_folder, "write_shard", write)
    assert "unfinished merge of something else (dtype differ)" in merge(
        capsys, 2, **asked, output_dir=tmp_path / "m", dtype="fp16"
    )
    assert "resuming  2 of" in merge(capsys, **asked, output_dir=tmp_path / "m")
    assert first == [(tmp_path / "m" / name).stat().st_mtime_ns for name in written]
    whole = tensors_of(tmp_path / "whole")
    for name, tensor in tensors_of(tmp_path / "m").items():
        assert torch.equal(tensor, whole.pop(name))
    assert not whole
    done = [json.loads((tmp_path / name / "merge.json").read_text())["done"] for name in ("whole", "m")]
    assert done[0] == done[1]
    assert not [file.name for file in (tmp_path / "m").glob(".model*")]
    assert "is not empty" in merge(capsys, 2, **asked, output_dir=tmp_path / "m")


@pytest.mark.parametrize("changed", ["adapter_config.json", "model.safetensors"])
def test_an_interrupted_merge_does_not_go_on_over_other_files(changed, llama, tmp_path, capsys, monkeypatch):
    base = shutil.copytree(llama, tmp_path / "b")
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base})
    asked = {"adapter": adapter, "check_rows": 0, "output_dir": tmp_path / "m", "max_shard_gb": 5e-5}
    with monkeypatch.context() as patched:
        patched.setattr(merged_folder, "write_index", interrupted)
        assert main(["merge", *flags(asked)]) == 130
    file = next(folder / changed for folder in (base, adapter) if (folder / changed).exists())
    file.write_bytes(file.read_bytes())  # as another run's, of the same size
    differing = "adapter_files" if changed == "adapter_config.json" else "base_files"
    assert f"unfinished merge of something else ({differing} differ)" in merge(capsys, 2, **asked)
    merge(capsys, **asked, overwrite_output_dir="true")


def interrupted(*given: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_of_another_adapter_is_never_the_output(llama, tmp_path, capsys):
    """Transformers opens the adapter's base there, and the merge would remove its weights."""
    adapter, other = (save_random_adapter(tmp_path / name, {"model_name": llama}) for name in "ab")
    before = {file: file.read_bytes() for file in other.iterdir()}
    said = merge(capsys, 2, adapter=adapter, output_dir=other, overwrite_output_dir="true")
    assert "holds an adapter" in said
    assert before == {file: file.read_bytes() for file in other.iterdir()}


def test_rounding_that_loses_what_was_learnt_is_told(llama, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama, "train_type": "lora"}, size=2e-6)
    said = merge(capsys, adapter=adapter, output_dir=tmp_path / "m", check_rows=1)
    assert "warning   many learnt changes are smaller than half a step of bf16" in said
    said = merge(capsys, adapter=adapter, output_dir=tmp_path / "f", check_rows=1, dtype="fp32")
    assert "rounding  to fp32: 100.0% of what the adapter learnt" in said
    assert "warning" not in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adapter": "{tmp}/nowhere"}, "adapter: {tmp}/nowhere is no folder (the current folder is "),
        ({"adapter": "{tmp}/a/adapter_config.json"}, "adapter: {tmp}/a/adapter_config.json is a file; give the output"),
        ({"adapter": "{tmp}"}, "adapter: {tmp} has no adapter_config.json and no adapter_model"),
        ({"model_name": "{tmp}/other"}, "adapter: {tmp}/a is of another model than {tmp}/other"),
        ({"train_type": "lora"}, "train_type: lora is not what {tmp}/a was trained with (qlora, by its config.yaml)"),
        ({"precision": "fp32"}, "precision: fp32 is not what {tmp}/a was trained with"),
        ({"dtype": "fp8"}, "--dtype fp8: 'fp8' is not allowed"),
        ({"adaptr": "x"}, "--adaptr x: there is no such option; did you mean adapter?"),
        ({"output_dir": "{tmp}/other"}, "output_dir: {tmp}/other is not empty"),
        ({"train_type": "lora", "double_quant": "true"}, "--double_quant true: has no effect with --train_type lora"),
    ],
)
def test_a_mistake_is_one_line(llama, tmp_path, capsys, change, says):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE | {"hidden_size": 32}), tmp_path / "other")
    options = {"adapter": adapter, "output_dir": tmp_path / "m"} | change
    said = merge(capsys, 2, **{name: str(value).format(tmp=tmp_path) for name, value in options.items()})
    assert says.format(tmp=tmp_path) in said
    assert not (tmp_path / "m" / "config.json").exists()


def test_a_disk_that_is_too_small_is_told_before_the_work(llama, tmp_path, capsys, monkeypatch):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: real._replace(free=1000))
    assert "has 0.00 GiB free and the merged model will take" in merge(
        capsys, 2, adapter=adapter, output_dir=tmp_path / "m"
    )
    assert not list((tmp_path / "m").glob("*.safetensors"))


def test_a_damaged_adapter_is_told_and_nothing_is_left_that_opens(llama, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama}, size=float("nan"))
    assert "comes out with NaN or infinity" in merge(capsys, 2, adapter=adapter, output_dir=tmp_path / "m")
    assert not (tmp_path / "m" / "config.json").exists()


@pytest.mark.parametrize("into", ["a", "b", "link"])
def test_adapter_and_base_are_never_the_output(llama, into, tmp_path, capsys):
    base = shutil.copytree(llama, tmp_path / "b")
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base})
    (tmp_path / "link").symlink_to(base)
    before = {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir()}
    said = merge(capsys, 2, adapter=adapter, output_dir=tmp_path / into, overwrite_output_dir="true")
    assert f"is the folder of the {'adapter' if into == 'a' else 'base'}" in said
    assert before == {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir()}


def test_a_model_that_pads_with_its_last_token_is_compared(tmp_path, capsys):
    base = tiny.save_model(transformers.LlamaConfig(**SHAPE | {"pad_token_id": 263}), tmp_path / "b", torch.bfloat16)
    adapter = save_random_adapter(tmp_path / "a", {"model_name": base, "train_type": "lora"})
    assert "compared  1 row " in merge(capsys, adapter=adapter, output_dir=tmp_path / "m", check_rows=1)


def test_a_merge_that_was_killed_before_its_first_file_goes_on(llama, tmp_path, capsys, monkeypatch):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    asked = {"adapter": adapter, "check_rows": 0, "output_dir": tmp_path / "m"}

    def killed(folder, shard, tensors, dtype):
        (folder / f".{shard.file}.1").write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merged_folder, "write_shard", killed)
        assert main(["merge", *flags(asked)]) == 130
    assert "the same command makes the rest" in capsys.readouterr().err
    assert "unfinished merge of something else" in merge(capsys, 2, **asked, dtype="fp16")
    merge(capsys, **asked)
    assert not list((tmp_path / "m").glob(".*"))


def test_a_merge_that_was_killed_in_its_comparison_goes_on_there(llama, tmp_path, capsys, monkeypatch):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    asked = {"adapter": adapter, "output_dir": tmp_path / "m"}
    merge(capsys, **asked, check_rows=0)
    monkeypatch.setattr(merged_folder, "_write", None)
    assert "compared  1 row " in merge(capsys, **asked, check_rows=1)
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["finished"]
    assert "is not empty" in merge(capsys, 2, **asked, check_rows=1)


def test_a_base_that_cannot_be_read_is_told_as_that(llama, tmp_path, capsys, monkeypatch):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error", str(llama / "model.safetensors"))

    monkeypatch.setattr(Checkpoint, "read", fails)
    said = merge(capsys, 1, adapter=adapter, output_dir=tmp_path / "m")
    assert f"model_name: {llama}/model.safetensors cannot be read any more (Input/output error)" in said


def test_sigterm_is_an_interruption(monkeypatch, capsys):
    def killed(asked):
        os.kill(os.getpid(), signal.SIGTERM)

    command = Command(MERGE.does, MERGE.program, killed, interrupted="what is left")
    monkeypatch.setattr(__main__, "COMMANDS", {"merge": command})
    monkeypatch.setattr(__main__.sys, "argv", ["fsdp-qlora", "merge", "--adapter", "a"])
    monkeypatch.setattr(__main__.os, "_exit", sys.exit)  # the test's own process is to go on
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            __main__.entry()
        assert ended.value.code == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "merge: interrupted; what is left" in capsys.readouterr().err
