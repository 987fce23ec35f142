"""Gathered parameters that outlast a step (ZeRO 1 and 2), refreshed when their shards have changed."""

from collections.abc import Mapping, Sequence

import torch

from graphopt._torch import version_of
from graphopt.runtime.collectives import Collectives, Pending


class Resident:
    """Whole parameters by name, each with the shard it was gathered from and that shard's version then."""

    def __init__(self, whole: Mapping[str, torch.Tensor]) -> None:
        """whole: storage that already holds them, [ranks * shard rows, ...]; what is missing is allocated."""
        self._whole = dict(whole)
        self._sources: dict[str, tuple[torch.Tensor, int]] = {}

    def refresh(
        self,
        names: Sequence[str],
        shards: Sequence[torch.Tensor],
        locals_: Sequence[torch.Tensor],
        collectives: Collectives,
        axis: str,
    ) -> Pending:
        """The whole parameters; a gather is started unless they are what was gathered last.

        shards: what moves, in the dtype of the computation; locals_: the stored shards, whose changes count.
        """
        sources = [(local, version_of(local)) for local in locals_]
        if all(self._is_fresh(name, *source) for name, source in zip(names, sources, strict=True)):
            return Pending(lambda: [self._whole[name] for name in names])
        gathered = collectives.all_gather(shards, axis)

        def finish() -> list[torch.Tensor]:
            for index, (name, source) in enumerate(zip(names, sources, strict=True)):
                self._store(name, gathered.take(index))
                self._sources[name] = source
            return [self._whole[name] for name in names]

        return Pending(finish)

    def _is_fresh(self, name: str, local: torch.Tensor, version: int) -> bool:
        source = self._sources.get(name)
        return source is not None and source[0] is local and source[1] == version

    def _store(self, name: str, value: torch.Tensor) -> None:
        whole = self._whole.get(name)
        if whole is not None and whole.dtype == value.dtype and whole.shape == value.shape:
            whole.copy_(value)
        else:
            self._whole[name] = value
