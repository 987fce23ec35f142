"""Rules of copies: waited for once, in one phase; what is elsewhere is read by copies back, from there, alone."""

from collections.abc import Iterator

from torch import fx

from graphopt.ir.copies import COPIED_IN, COPIED_OUT, COPY_IN, COPY_OUT, PLACES
from graphopt.ir.facts import facts_of
from graphopt.ir.program import Program
from graphopt.ir.roles import OutputKind
from graphopt.ir.values import is_dense

_WAITS: dict[object, object] = {COPY_OUT: COPIED_OUT, COPY_IN: COPIED_IN}
_LAUNCHES = {wait: launch for launch, wait in _WAITS.items()}
_RETURNED = frozenset(OutputKind) - {OutputKind.SAVED, OutputKind.GRADIENT}


def copy_problems(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Each node that breaks a rule, with what it does."""
    for node in program.graph.nodes:
        if node.target in _WAITS:
            yield from _launch_problems(node)
        elif node.target in _LAUNCHES and _target(node.args[0]) is not _LAUNCHES[node.target]:
            yield node, f"waits for {node.args[0]}, which launches no such copy"
        if node.target is COPIED_OUT or (node.op == "placeholder" and _is_copied_in(node)):
            for user in node.users:
                if user.op != "output" and user.target not in (COPY_IN, COPIED_IN):
                    yield user, f"reads {node.name}, which is elsewhere; copy it back first"
    for role, result in program.results_of(*_RETURNED):
        if result is not None and result.target is COPIED_OUT:
            yield result, f"is returned as '{role}' but is elsewhere; copy it back first"


def _launch_problems(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    if node.args[-1] not in PLACES:
        yield node, f"names the place {node.args[-1]!r}; known places are {', '.join(PLACES)}"
    if node.target is COPY_IN and not _is_elsewhere(node.args[0]):
        yield node, f"copies back {node.args[0]}, which is not elsewhere"
    (source,) = node.all_input_nodes
    if not is_dense(source.meta["val"]):
        yield node, f"copies {source.name}, whose elements do not follow each other without gaps"
    for other in _launches_of(source) if node.target is COPY_IN else ():
        if other.args[-1] != node.args[-1]:
            yield node, f"copies back from {node.args[-1]} what is on {other.args[-1]} for {other.name}"
    waits = [user for user in node.users if user.target is _WAITS[node.target]]
    if len(waits) != 1:
        yield node, f"is waited for {len(waits)} times; a copy is waited for exactly once"
    others = [user.name for user in node.users if user.target is not _WAITS[node.target]]
    if others:
        yield node, f"is read by {', '.join(others)} before it is waited for"
    for wait in waits:
        if wait.args[1] is not node.args[0]:
            yield wait, f"holds on to {wait.args[1]} until the copy of {node.args[0]} is complete"
        if facts_of(wait).phase is not facts_of(node).phase:
            yield wait, f"waits in another phase than {node.name} is launched in"


def _launches_of(kept: fx.Node) -> Iterator[fx.Node]:
    """The copies that know where a value is."""
    yield from (source for source in kept.all_input_nodes if source.target is COPY_OUT)
    yield from (user for user in kept.users if user.target is COPY_IN)


def _is_copied_in(value: fx.Node) -> bool:
    return any(user.target is COPY_IN for user in value.users)


def _is_elsewhere(value: object) -> bool:
    """What was copied out is, and a parameter may be."""
    return isinstance(value, fx.Node) and (value.op == "placeholder" or value.target is COPIED_OUT)


def _target(value: object) -> object:
    return value.target if isinstance(value, fx.Node) else None
