"""Gathered parameters that outlast a step (ZeRO 1 and 2), gathered anew when their shards may have changed."""

from collections.abc import Mapping, Sequence

import torch

from graphopt._torch import local_tensor, version_of
from graphopt.runtime.collectives import Collectives
from graphopt.runtime.pending import Pending

_Source = tuple[torch.Tensor, int, int]


class Resident:
    """Whole parameters by name, each with the parameter it was gathered from and its versions then.

    Version counters see every change in place but one made through ``.data``; `invalidate` covers the moments at which
    such a change is usual.
    """

    def __init__(self, whole: Mapping[str, torch.Tensor]) -> None:
        """whole: storage that already holds them, [ranks * shard rows, ...]; what is missing is allocated."""
        self._whole = dict(whole)
        self._sources: dict[str, _Source] = {}

    def invalidate(self) -> None:
        """Gather anew at the next use: an optimizer may have run, or another program is about to."""
        self._sources.clear()

    def release(self) -> None:
        """Let go of all that was gathered."""
        self._whole.clear()
        self._sources.clear()

    def refresh(
        self,
        names: Sequence[str],
        shards: Sequence[torch.Tensor],
        parameters: Sequence[torch.Tensor],
        collectives: Collectives,
        axis: str,
    ) -> Pending:
        """The whole parameters; a gather is started unless they are what was gathered last.

        shards: what moves, in the dtype of the computation; parameters: as the model holds them, whose changes count.
        """
        sources = [(p, version_of(p), version_of(local_tensor(p))) for p in parameters]
        if all(self._is_fresh(name, source) for name, source in zip(names, sources, strict=True)):
            return Pending(lambda: [self._whole[name] for name in names])
        gathered = collectives.all_gather(
            shards, axis, [self._storage(n, s) for n, s in zip(names, shards, strict=True)]
        )

        def finish() -> list[torch.Tensor]:
            for index, (name, source) in enumerate(zip(names, sources, strict=True)):
                self._whole[name] = gathered.take(index)
                self._sources[name] = source
            return [self._whole[name] for name in names]

        return Pending(finish)

    def _is_fresh(self, name: str, source: _Source) -> bool:
        known = self._sources.get(name)
        return known is not None and known[0] is source[0] and known[1:] == source[1:]

    def _storage(self, name: str, shard: torch.Tensor) -> torch.Tensor | None:
        """The storage to fill again, if the parameter is kept in the dtype that moves."""
        whole = self._whole.get(name)
        return whole if whole is not None and whole.dtype == shard.dtype else None
