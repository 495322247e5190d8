"""A disk that takes no more of a file: the kernel refuses the write, as it does on a full one."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

REFUSED = os.strerror(errno.EFBIG)


@contextmanager
def no_file_beyond(nbytes: int) -> Iterator[None]:
    """Let writes of this process beyond so many bytes of a file fail with EFBIG; Python ignores their signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
