"""Results of collectives in flight, waited for item by item."""

from collections.abc import Callable

import torch

Finish = Callable[[], list[torch.Tensor]]


class Pending:
    """The results of a collective in flight; ``pending[i].wait()`` hands out each of them once."""

    def __init__(self, finish: Finish) -> None:
        self._finish: Finish | None = finish
        self._results: list[torch.Tensor | None] = []

    def __getitem__(self, index: int) -> "PendingItem":
        return PendingItem(self, index)

    def take(self, index: int) -> torch.Tensor:
        """Wait, and give result `index` away: it lives from then on as long as its taker wants."""
        if self._finish is not None:
            self._results = list(self._finish())
            self._finish = None
        result, self._results[index] = self._results[index], None
        assert result is not None, "a result is waited for once"
        return result


class PendingItem:
    """One result of a collective in flight."""

    __slots__ = ("_index", "_pending")

    def __init__(self, pending: Pending, index: int) -> None:
        self._pending = pending
        self._index = index

    def wait(self) -> torch.Tensor:
        return self._pending.take(self._index)
