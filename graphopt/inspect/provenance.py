"""What a pass did to a program: which nodes it made, changed, moved and removed, and what stands for what."""

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphopt.inspect.recorder import NodeRecord, Stage


@dataclass(frozen=True)
class Changes:
    """Between two stages.

    made: nodes that were not there, each with the name of the node before that it stems from, if that is known.
    changed: nodes with another operator, arguments, value or role, before and after.
    removed: nodes that are gone, each with the names of those that are read in its place, or stem from it.
    moved: nodes that run at another place among those that stayed: those that the pass gives a reason for, and the
        fewest of the others that explain the new order.
    """

    made: list[tuple[NodeRecord, str | None]] = field(default_factory=list)
    changed: list[tuple[NodeRecord, NodeRecord]] = field(default_factory=list)
    removed: list[tuple[NodeRecord, list[str]]] = field(default_factory=list)
    moved: list[NodeRecord] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {
            "made": len(self.made),
            "changed": len(self.changed),
            "moved": len(self.moved),
            "removed": len(self.removed),
        }


def changes(before: Stage | None, after: Stage) -> Changes:
    """What made `after` of `before`; for the capture there is no before, and everything is made."""
    if before is None:
        return Changes(made=[(record, None) for record in after.nodes])
    old = dict(zip(before.identities, before.nodes, strict=True))
    new = dict(zip(after.identities, after.nodes, strict=True))
    places = _places_taken(before, old, new)
    return Changes(
        made=[(r, r.facts.origin) for identity, r in new.items() if identity not in old],
        changed=[(old[i], r) for i, r in new.items() if i in old and _content(old[i]) != _content(r)],
        removed=[(r, places[r.name]) for identity, r in old.items() if identity not in new],
        moved=_moved(old, new),
    )


def _content(record: NodeRecord) -> tuple[object, ...]:
    return record.target, record.arguments, record.value, record.facts.phase


def _places_taken(before: Stage, old: dict[int, NodeRecord], new: dict[int, NodeRecord]) -> defaultdict[str, list[str]]:
    """For each name of a node that is gone: what its readers read now, and what was made of it."""
    found: defaultdict[str, dict[str, None]] = defaultdict(dict)
    gone = {record.name for identity, record in old.items() if identity not in new}
    for identity, reader in old.items():
        now = new.get(identity)
        if now is not None and now.inputs != reader.inputs:
            fresh = [name for name in now.inputs if name not in reader.inputs]
            for position, name in enumerate(reader.inputs):
                if name in gone:
                    aligned = len(now.inputs) == len(reader.inputs)
                    found[name].update(dict.fromkeys([now.inputs[position]] if aligned else fresh))
    for identity, record in new.items():
        if identity not in old and record.facts.origin in gone:
            found[record.facts.origin][record.name] = None
    return defaultdict(list, {name: list(names) for name, names in found.items()})


def _moved(old: dict[int, NodeRecord], new: dict[int, NodeRecord]) -> list[NodeRecord]:
    """Of the nodes in both, those with a new reason alone, and those outside a longest common order of the rest."""
    both = [identity for identity in new if identity in old]
    given = {i for i in both if _content(old[i]) == _content(new[i]) and old[i].facts.reasons != new[i].facts.reasons}
    position = {identity: index for index, identity in enumerate(old)}
    rest = [identity for identity in both if identity not in given]
    kept = _longest_increasing([position[identity] for identity in rest])
    given.update(identity for index, identity in enumerate(rest) if index not in kept)
    return [new[identity] for identity in both if identity in given]


def _longest_increasing(values: Sequence[int]) -> set[int]:
    """Indices of a longest increasing subsequence, by patience sorting (Fredman 1975), in n log n."""
    tops: list[int] = []
    top_index: list[int] = []
    previous: list[int] = []
    for index, value in enumerate(values):
        pile = bisect.bisect_left(tops, value)
        previous.append(top_index[pile - 1] if pile else -1)
        tops[pile : pile + 1] = [value]
        top_index[pile : pile + 1] = [index]
    found: set[int] = set()
    at = top_index[-1] if top_index else -1
    while at >= 0:
        found.add(at)
        at = previous[at]
    return found
