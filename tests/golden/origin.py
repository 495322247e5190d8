"""Tell whether a process runs the code of its own checkout: an editable install can lend it another's."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def strangers() -> list[str]:
    """Return the loaded modules that lie outside this checkout, of those packages that have modules inside."""
    files = {name: Path(file).resolve() for name, file in _loaded()}
    inside = {name for name, file in files.items() if file.is_relative_to(ROOT) and not _is_installed(file)}
    ours = {name.split(".")[0] for name in inside}
    return sorted(name for name in files.keys() - inside if name.split(".")[0] in ours)


def _loaded() -> list[tuple[str, str]]:
    """Return (name, file) of the loaded modules that have one; some of PyTorch's have the name of none."""
    pairs = [(name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items())]
    return [(name, file) for name, file in pairs if file and Path(file).is_absolute() and name != "__main__"]


def _is_installed(file: Path) -> bool:
    """Whether the file belongs to the Python environment, which may lie in the checkout."""
    prefix = Path(sys.prefix).resolve()
    return prefix != ROOT and file.is_relative_to(prefix)
