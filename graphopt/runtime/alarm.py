"""Why a rank has stopped, told to those that wait for it."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from graphopt._torch import default_store
from graphopt.errors import GraphoptError, OffloadError, RankLostError

Look = Callable[[], None]

LOOK_SECONDS = 1.0
_STAY_SECONDS = 10.0


_QUOTED = {error.__name__: error for error in (OffloadError, RankLostError)}


class Alarm:
    """The ranks of a model wait for each other in every step: one that fails says so before it stops.

    Nothing is sent while all goes well. Who has waited for a while, or whose wait has failed, looks into the store in
    which the ranks met. Once the alarm was given the ranks are out of step, so none of them runs the model again.
    """

    def __init__(self, store: Store | None, rank: int, ranks: int) -> None:
        """All ranks make theirs in the same order. store: None in a world of one."""
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._key = "" if store is None else f"graphopt/alarm/{store.add(f'graphopt/alarms/{rank}', 1)}"
        self._said: str | None = None

    @classmethod
    def of_world(cls) -> "Alarm":
        """That of all ranks of the default process group, which is there."""
        return cls(default_store(), dist.get_rank(), dist.get_world_size())

    def look(self) -> None:
        """Raises an error that quotes the rank that has given the alarm, if one has.

        OffloadError, if that was what came there; RankLostError for all else.
        """
        with contextlib.suppress(dist.DistError):  # the store has ended with its rank, whose output says why
            self._hear()
        self._raise_again()

    @contextlib.contextmanager
    def watching(self, moment: str, errors: type[Exception] = OffloadError) -> Iterator[None]:
        """One of `errors` that comes inside gives the alarm. moment: what is done there, for messages.

        Raises that error with the moment, or one that quotes another rank's: also where the wait for that rank has
        failed, and at once if the alarm was given before.
        """
        self._raise_again()
        try:
            yield
        except Exception as error:
            if self._said is not None:  # another rank's, that a wait came upon
                raise
            if isinstance(error, RankLostError) or not isinstance(error, errors):
                self.look()
            if isinstance(error, errors):
                self._tell(error, moment)
            if isinstance(error, OffloadError):
                raise OffloadError(f"{moment}: {error}") from error
            if isinstance(error, errors):
                error.add_note(f"in {moment}")
            raise

    def _tell(self, error: Exception, moment: str) -> None:
        kind = OffloadError if isinstance(error, OffloadError) else RankLostError
        what = str(error) if isinstance(error, GraphoptError) else f"{type(error).__name__}: {error}"
        alive = self._ranks - isinstance(error, RankLostError)
        with contextlib.suppress(dist.DistError):  # the others have ended already
            self._give(f"{kind.__name__}\nrank {self._rank}: {moment}: {what}", alive)

    def _raise_again(self) -> None:
        if self._said is not None:
            kind, what = self._said.split("\n", 1)
            raise _QUOTED[kind](what)

    def _hear(self) -> None:
        if self._store is not None and self._said is None and self._store.check([self._key]):
            self._said = self._store.get(self._key).decode()
            self._store.add(f"{self._key}/heard", 1)

    def _give(self, said: str, alive: int) -> None:
        """Returns when so many ranks have heard, or after a while: the store may end with this process."""
        if self._store is None:
            return
        self._said = said  # also where nobody can be told
        self._said = self._store.compare_set(self._key, "", said).decode()
        self._store.add(f"{self._key}/heard", 1)
        end = time.monotonic() + _STAY_SECONDS
        while self._store.add(f"{self._key}/heard", 0) < alive and time.monotonic() < end:
            time.sleep(LOOK_SECONDS / 10)


def unwatched() -> None:
    """Looks for no alarm."""
