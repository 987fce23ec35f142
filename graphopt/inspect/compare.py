"""Two plans for one model, side by side: time, memory, bytes, and what lies or travels otherwise."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.inspect.inspection import Inspection
from graphopt.ir import InputKind, OutputKind, Phase, facts_of
from graphopt.ir.collectives import Collective, collectives_of, sources_of, uncast, waits_of
from graphopt.sizes import readable_size, readable_time

Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Comparison:
    """left, right: the plans. rows: (what, of the left, of the right, right / left). moved: what is elsewhere."""

    left: str
    right: str
    rows: list[Row]
    moved: list[tuple[str, str, str]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "left": self.left,
            "right": self.right,
            "rows": [list(row) for row in self.rows],
            "moved": [list(row) for row in self.moved],
        }


def compare(left: Inspection, right: Inspection) -> Comparison:
    """What another plan makes of the same model."""
    rows = [
        *_times(left, right),
        *_memory(left, right),
        *_communication(left, right),
    ]
    here, there = _whereabouts(left), _whereabouts(right)
    names = dict.fromkeys((*here, *there))
    moved = [
        (name, here.get(name, "nowhere"), there.get(name, "nowhere"))
        for name in names
        if here.get(name) != there.get(name)
    ]
    return Comparison(str(left.plan), str(right.plan), rows, moved)


def _times(left: Inspection, right: Inspection) -> Iterator[Row]:
    one, other = left.schedule, right.schedule
    yield _row("time of a step", one.total_seconds, other.total_seconds, readable_time)
    yield _row("computing", one.compute_seconds, other.compute_seconds, readable_time)
    yield _row("waiting for communication", one.exposed_seconds, other.exposed_seconds, readable_time)


def _memory(left: Inspection, right: Inspection) -> Iterator[Row]:
    one, other = left.report.memory, right.report.memory
    yield _row("peak memory", one.peak_bytes, other.peak_bytes, readable_size)
    for category in dict.fromkeys((*one.by_category, *other.by_category)):
        here, there = one.by_category.get(category, 0), other.by_category.get(category, 0)
        yield _row(f"{category}, at most", here, there, readable_size)
    for place in dict.fromkeys((*one.elsewhere, *other.elsewhere)):
        yield _row(
            f"elsewhere: on {place}, at most", one.elsewhere.get(place, 0), other.elsewhere.get(place, 0), readable_size
        )


def _communication(left: Inspection, right: Inspection) -> Iterator[Row]:
    one, other = left.report.communication, right.report.communication
    yield _row("bytes sent", one.total_bytes, other.total_bytes, readable_size)
    for key in dict.fromkeys((*one.calls, *other.calls)):
        yield _row(f"{key[0]} over {key[1]}, calls", one.calls.get(key, 0), other.calls.get(key, 0), str)


def _row(what: str, here: float, there: float, shown: Any) -> Row:
    ratio = "" if here == there == 0 else f"{there / here:.3f}" if here else "new"
    return what, shown(here), shown(there), ratio


def _whereabouts(inspection: Inspection) -> dict[str, str]:
    """How each parameter lies, where it is gathered in each phase, and where its gradient is reduced."""
    program = inspection.program
    found = {
        role.name: f"{role.kind.value} {tuple(node.meta['val'].shape)}"
        for role, node in program.nodes_of(InputKind.PARAMETER, InputKind.SHARD)
    }
    parameter = {node: role.name for role, node in program.nodes_of(InputKind.PARAMETER, InputKind.SHARD)}
    gradient = {node: role.name for role, node in program.results_of(OutputKind.GRADIENT) if node is not None}
    for collective in collectives_of(program):
        if collective.kind == "all-gather":
            for name in filter(None, (_parameter(source, parameter) for source in sources_of(collective.node))):
                found[f"{name} gathered in {collective.phase.value}"] = f"in {_reader(collective)}"
        elif collective.phase is Phase.BACKWARD:
            for name in _gradients(collective.node, gradient):
                found[f"gradient of {name}"] = f"{collective.kind} in {facts_of(collective.node).module or 'the model'}"
    return found


def _parameter(source: fx.Node, names: Mapping[fx.Node, str]) -> str | None:
    """The parameter that a gather moves, behind a cast if there is one; None if it moves another value."""
    return names.get(uncast(source))


def _reader(collective: Collective) -> str:
    """The module that needs a gather first."""
    readers = sorted(reader for wait in waits_of(collective.node) for reader in wait.users)
    return facts_of(readers[0]).module or "the model"


def _gradients(launched: fx.Node, names: Mapping[fx.Node, str]) -> Iterator[str]:
    """The gradients that a reduction leads to."""
    todo, seen = [launched], {launched}
    while todo:
        node = todo.pop()
        if node in names:
            yield names[node]
        fresh = [user for user in node.users if user.op != "output" and user not in seen]
        seen.update(fresh)
        todo.extend(fresh)
