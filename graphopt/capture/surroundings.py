"""The settings of torch around a call that decide what it computes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Surroundings:
    """gradients: whether autograd records. autocast: the dtype of the autocast region, None outside of one."""

    gradients: bool
    device: str
    autocast: torch.dtype | None

    @classmethod
    def now(cls, device: str) -> "Surroundings":
        """As they are here, on such devices."""
        region = torch.is_autocast_enabled(device)
        return cls(torch.is_grad_enabled(), device, torch.get_autocast_dtype(device) if region else None)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """As they were then: what is captured again during backward would find autograd off, and no autocast."""
        with (
            torch.set_grad_enabled(self.gradients),
            torch.autocast(self.device, self.autocast, enabled=self.autocast is not None),
        ):
            yield
