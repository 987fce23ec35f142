"""What the compiler leaves for people to read, under one folder: named by content, so that it is written once.

Many processes may write the same thing at the same time; none sees it half written.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def artifact_directory() -> Path:
    """``$GRAPHOPT_ARTIFACTS``, or a folder of this user's in the temporary one."""
    configured = os.environ.get("GRAPHOPT_ARTIFACTS")
    return Path(configured) if configured else Path(tempfile.gettempdir()) / f"graphopt-{os.getuid()}"


def write_file(stem: str, suffix: str, text: str) -> Path:
    """A file of that text, ``stem_digest.suffix``."""
    path = _made() / f"{stem}_{_digest(text)}{suffix}"
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    return path


def write_folder(stem: str, files: Mapping[str, str], identity: str) -> Path:
    """A folder of text files by name, ``stem_digest``; identity: what the digest is taken of."""
    path = _made() / f"{stem}_{_digest(identity)}"
    if not path.exists():
        temporary = Path(tempfile.mkdtemp(dir=path.parent, suffix=".partial"))
        try:
            for name, text in files.items():
                (temporary / name).write_text(text, encoding="utf-8")
            _moved(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def _made() -> Path:
    folder = artifact_directory()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _moved(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError:  # where another process was first, its folder says the same
        if not path.is_dir():
            raise


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
