"""An Ollama Modelfile beside a GGUF file: its name, its stop tokens, and the chat template where its form is known.

Ollama's templates are Go's. The tokenizer's own template is rendered on a conversation and compared with that of a
known form; where none is the same, Ollama reads the template that is inside the GGUF file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.atomic_files import atomic_file

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a bird."},
    {"role": "assistant", "content": "Owl."},
    {"role": "user", "content": "And a fish?"},
]


def _chatml(turns: Sequence[Mapping[str, str]]) -> str:
    said = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return f"{said}<|im_start|>assistant\n"


def _llama3(turns: Sequence[Mapping[str, str]]) -> str:
    said = "".join(
        f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content']}<|eot_id|>" for turn in turns
    )
    return f"{said}<|start_header_id|>assistant<|end_header_id|>\n\n"


# How a conversation is written -> the same as a Go template.
FORMS = {
    _chatml: (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    ),
    _llama3: (
        "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}


def modelfile_of(target: Path) -> Path:
    """Return the path of the Modelfile of a GGUF file."""
    return target.with_name(f"{target.stem}.Modelfile")


def write_modelfile(target: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the Modelfile of a model's GGUF file beside it; return its path."""
    lines = [f"FROM ./{target.name}"]
    template = go_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    elif tokenizer.chat_template is not None:
        lines.append("# no TEMPLATE: Ollama takes the chat template inside the GGUF file, where it knows its form")
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return _write(target, lines)


def write_adapter_modelfile(target: Path, base: str) -> Path:
    """Write the Modelfile of an adapter's GGUF file beside it; return its path."""
    lines = [f"# the base that the adapter was trained over: {base}", "FROM base.gguf", f"ADAPTER ./{target.name}"]
    return _write(target, lines)


def go_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokenizer's chat template as Go's, None where its form is not known."""
    if tokenizer.chat_template is None:
        return None
    try:
        said = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template that refuses system messages
        return None
    same = (said, said.removeprefix(tokenizer.bos_token or ""))  # BOS is put first by the model's own flag
    return next((template for form, template in FORMS.items() if form(CONVERSATION) in same), None)


def _write(target: Path, lines: Sequence[str]) -> Path:
    file = modelfile_of(target)
    with atomic_file(file) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
