"""State that lives outside of memory."""

from graphopt.offload.adamw import DiskAdamW

__all__ = ["DiskAdamW"]
