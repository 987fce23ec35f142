"""A tensor on its way to or from a file."""

from concurrent.futures import Future

import torch


class Transfer:
    """A write or a read under way. The tensor must be left alone until `wait` has returned."""

    def __init__(self, future: "Future[list[torch.Tensor]]") -> None:
        """future: gives the tensor in a list, out of which it is taken, so that no thread holds on to it."""
        self._future = future
        self._tensor: torch.Tensor | None = None
        self._is_claimed = False

    def wait(self) -> torch.Tensor:
        """The tensor that was written or filled, when it is. Raises OffloadError if that failed."""
        self.settle()
        self._is_claimed = True
        if self._tensor is None:
            self._tensor = self._future.result().pop()
        return self._tensor

    def settle(self) -> None:
        """Wait without asking how it went: the tensor is free for other use afterwards."""
        self._future.exception()

    @property
    def is_done(self) -> bool:
        return self._future.done()

    @property
    def unclaimed_error(self) -> BaseException | None:
        """What went wrong, if nobody has been told by `wait`; waits for the end."""
        return None if self._is_claimed else self._future.exception()
