"""The versions of what takes part in a compilation."""

import platform
from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """Of graphopt ("not installed" where it is imported from a checkout that is not), torch and Python."""
    try:
        own = metadata.version("graphopt")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"graphopt": own, "torch": str(torch.__version__), "python": platform.python_version()}
