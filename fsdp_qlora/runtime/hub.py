"""Whether the model hub can be reached, asked once: else its clients retry for half a minute for every file."""

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import MutableMapping

PATIENCE_SECONDS = 5.0
SETTINGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def go_offline_if_unreachable(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Where nobody answers at the hub's address, tell its clients to use what is cached; a line for the user, or None.

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
