"""The door to `kernels/`: makes the folder importable as `fsdp_qlora.kernels.x` from a checkout and from an install.

A top-level package called `kernels` would shadow Hugging Face's own of that name, which transformers imports. So the
folder has no `__init__.py`, and this module stands in for the package: its search path is `fsdp_qlora/kernels` where
an install has put the files there, else the checkout's `kernels/`.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_installed = _here / "kernels"
__path__ = [str(_installed if any(_installed.glob("*.py")) else _here.parent / "kernels")]
