"""llama.cpp as the server of a GGUF file, out of the package xllamacpp: its answers to conversations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xllamacpp

SILENT = -1  # of its log's levels


@dataclass(frozen=True)
class Served:
    """An answer, and how many tokens the server made of the conversation."""

    text: str
    prompt_tokens: int


def server_answers(
    file: Path, asked: Sequence[Sequence[Mapping[str, str]]], most_tokens: int, lora: Path | None = None
) -> list[Served]:
    """Return greedy answers to conversations, rendered by the chat template in the file. lora: an adapter's file."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_gpu_layers, settings.verbosity = 256, 0, SILENT
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    if lora is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(settings)
    answers = []
    for turns in asked:
        wanted = {"messages": list(turns), "max_tokens": most_tokens, "temperature": 0}
        said = server.handle_chat_completions(wanted)
        found = said if isinstance(said, dict) else json.loads(said)
        answers.append(Served(found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]))
    return answers
