"""`merge` and `gguf` hold a few blocks of the model in memory, however many it has."""

import sys
from pathlib import Path

import pytest

from benchmarks.second_start import make_checkpoint
from fsdp_qlora.units import GIB
from tests.support.measured import run_measured
from tests.support.saved_adapters import save_random_adapter
from tests.support.small_tokenizers import gpt2_tokenizer

pytest.importorskip("gguf")

SHAPE = {"hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 2,
         "vocab_size": 448, "max_position_embeddings": 256}  # fmt: skip
BLOCK = 2 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 7168 * 2048)  # bytes of its linears in 16 bits
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
COMMANDS = (["merge", "--check_rows", "1"], ["gguf", "--quantization", "q8_0"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
def test_memory_is_of_three_blocks_however_many_there_are(tmp_path):
    adapters = {}
    for name, shape in (("tiny", SHAPE | TINY | {"num_hidden_layers": 1}), ("few", SHAPE | {"num_hidden_layers": 1}),
                        ("many", SHAPE | {"num_hidden_layers": 3})):  # fmt: skip
        make_checkpoint(tmp_path / name, shape)
        gpt2_tokenizer().save_pretrained(tmp_path / name)
        asked = {"model_name": tmp_path / name, "lora_rank": 16}
        adapters[name] = save_random_adapter(tmp_path / name / "adapter", asked)
    tiny = peak(COMMANDS[0], adapters.pop("tiny"), tmp_path / "out" / "tiny")  # of the libraries, the same for both
    assert tiny < GIB
    for command in COMMANDS:
        peaks = {name: peak(command, adapter, tmp_path / "out" / name) for name, adapter in adapters.items()}
        print(f"{command[0]}: {tiny >> 20}, { ({name: nbytes >> 20 for name, nbytes in peaks.items()}) } MiB")
        assert peaks["few"] - tiny < 3 * BLOCK
        assert peaks["many"] - peaks["few"] < BLOCK / 4


def peak(command: list[str], adapter: Path, out: Path) -> int:
    """Return the most bytes of memory that a command had at once.

    What it frees goes back at once: this is a test of what is held, and not of malloc."""
    arguments = ["-m", "fsdp_qlora", *command, "--adapter", adapter, "--output_dir", out / command[0]]
    took = run_measured(arguments, {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"})
    assert took.code == 0, took.said
    return took.resident_bytes
