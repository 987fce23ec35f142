"""Exchanges in which every rank of a group posts to all others, in memory that they share."""

from graphopt.errors import RankMismatchError
from graphopt.runtime.links import Links, Segment


class Channel:
    """This rank's side of a group in which all post in the same order."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.rank = links.rank
        self.ranks = links.ranks
        self._posted = 0
        self._own: dict[int, tuple[Segment, int]] = {}

    def segment(self, size: int) -> Segment:
        """A segment of at least `size` bytes that nobody reads any more."""
        return self.links.segment(size, self.links.others)

    def post(self, segment: Segment, size: int) -> int:
        """Let the others read the first `size` bytes. Returns the number of the exchange, the same on all ranks."""
        segment.readers.add(self.rank)
        self._own[self._posted] = (segment, size)
        for neighbour in self.links.others:
            self.links.offer(segment, size, neighbour)
        self._posted += 1
        return self._posted - 1

    def read(self, exchange: int) -> list[Segment]:
        """What each rank posted, in rank order; waits for those that have not.

        Raises RankMismatchError if one posted another number of bytes, RankLostError if one has ended.
        """
        own = self._own[exchange]
        posted = [own if r == self.rank else self.links.offered(r, exchange) for r in range(self.ranks)]
        for rank, (_, size) in enumerate(posted):
            if size != own[1]:
                raise RankMismatchError(
                    f"{self.links.name(rank)} sent {size} bytes where {self.links.name(self.rank)} sent {own[1]}: "
                    "they run different programs"
                )
        return [segment for segment, _ in posted]

    def done(self, exchange: int) -> None:
        """This rank reads nothing of the exchange any more, whether or not everything of it has arrived."""
        segment, _ = self._own.pop(exchange)
        segment.readers.discard(self.rank)
        for neighbour in self.links.others:
            self.links.done(neighbour, exchange)
