"""The folders that a run writes to: what the user is told where one cannot be written."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsdp_qlora.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing_to(folder: Path, option: str) -> Iterator[None]:
    """Makes `folder`, the value of `option`, where it is missing. Raises UserError where it, or the block, cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        advice = "free some space or choose another folder" if error.errno in NO_ROOM else "choose another folder"
        raise UserError(f"{option}: {folder} cannot be written ({error.strerror}); {advice}") from error
