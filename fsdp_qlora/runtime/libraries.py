"""Libraries before they are imported: whether they are there, what they print and prepare, whether they ask the hub."""

import importlib.util
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import MutableMapping

# Logger -> how its message begins.
SILENCED = {
    # When it is imported on a CPU with AVX512-BF16, bitsandbytes looks for a compiled kernel of its own 4-bit matmul.
    # That matmul is never called here, and what it advises to install would change nothing.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
PATIENCE_SECONDS = 5.0
SETTINGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def go_offline_if_unreachable(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Tell the hub's clients to use their cache if the hub does not answer; return a line for the user, or None.

    Before they are imported: that is when they read their settings. Does nothing where the user has set one of them.
    """
    if any(name in environ for name in SETTINGS):
        return None
    address = environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLError):
            return None  # it answers; whose certificates its clients trust is their own setting
        environ["HF_HUB_OFFLINE"] = "1"
        return f"the model hub ({address}) cannot be reached ({reason}): only what is on this machine can be used"
    return None


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # without an origin it is a mere folder, as wandb leaves behind


def leave_out_compiler() -> None:
    """Make `torch.compile` leave functions as they are, in this process. Call it before the libraries are imported.

    Nothing here is compiled by it. transformers imports hqq, and hqq and bitsandbytes prepare functions that are not
    used here: with them all of TorchInductor is imported, 1 s of 7 on a fast host."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def silence() -> None:
    """Stop showing these messages from now on. Call it before the libraries are imported: some print at once."""
    for logger in SILENCED:
        logging.getLogger(logger).addFilter(_is_worth_telling)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(SILENCED[record.name])
