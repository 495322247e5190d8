"""Messages of libraries that tell a user of this program nothing: silenced one by one, with the reason."""

import logging

# Logger -> how its message begins.
SILENCED = {
    # When it is imported on a CPU with AVX512-BF16, bitsandbytes looks for a compiled kernel of its own 4-bit matmul.
    # That matmul is never called here, and what it advises to install would change nothing.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def silence() -> None:
    """From now on these messages are not shown. Before the libraries are imported: some speak at once."""
    for logger in SILENCED:
        logging.getLogger(logger).addFilter(_is_worth_telling)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(SILENCED[record.name])
