"""Whether a folder's file system takes direct I/O, which goes past the page cache."""

import errno
import os
import tempfile
from pathlib import Path

import torch

from graphopt.runtime.files.memory import PAGE, buffer_of, page_aligned

_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


def refusal_of_direct(folder: Path) -> str | None:
    """Why files in `folder` cannot be opened for direct I/O; None if they can, which is tried. Raises OSError."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return "this system has none"
    page = buffer_of(page_aligned([PAGE], torch.uint8))
    with tempfile.NamedTemporaryFile(dir=folder, prefix="direct-") as named:
        try:
            file = os.open(named.name, os.O_RDWR | flag)
            try:
                os.pwritev(file, [page], 0)
                os.preadv(file, [page], 0)
            finally:
                os.close(file)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            return f"its file system says {os.strerror(error.errno)!r}"
    return None
