"""Folders for what does not outlive the process."""

import tempfile
from pathlib import Path

import torch.distributed as dist

from graphopt.errors import OffloadError


def working_folder(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    """A new folder of this rank within `folder`, removed with the object. Raises OffloadError if it cannot be made."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f"rank{rank}-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise OffloadError(f"cannot write to the folder {folder}: {error.strerror}") from error
