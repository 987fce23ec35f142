"""What is always true of a program, checked between any two passes."""

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import fx

from graphopt._torch import FakeTensorMode
from graphopt.errors import VerificationError
from graphopt.ir.effects import Effect, effect_of
from graphopt.ir.facts import Phase, facts_of
from graphopt.ir.layout import ParameterLayout
from graphopt.ir.program import Level, Program
from graphopt.ir.roles import GRADIENTS, InputKind, OutputKind
from graphopt.verify.copies import copy_problems
from graphopt.verify.meaning import Meaning, check_same, meaning_of
from graphopt.verify.surroundings import surroundings
from graphopt.verify.transfers import transfer_problems
from graphopt.verify.value_numbers import ValueNumbers
from graphopt.verify.values import ValueChecker


class Verifier:
    """Checks the programs of one compilation, one after the other; what did not change is not run again.

    mesh: axis name -> ranks. layouts: how each parameter lies over them; without one, nothing is known of it.
    """

    def __init__(
        self, fake_mode: FakeTensorMode, mesh: Mapping[str, int], layouts: Mapping[str, ParameterLayout]
    ) -> None:
        self._mesh = mesh
        self._layouts = layouts
        self._checker = ValueChecker(fake_mode)
        self._numbers = ValueNumbers(layouts)

    def check(self, program: Program) -> Meaning:
        """Check `program` against the rules of its level, and say what it computes.

        Roles match inputs and outputs, and parameters and gradients their layouts; nodes read only what stands before
        them, and forward nodes nothing of backward; values have the shapes and dtypes that the operators give; nothing
        is written in place; each collective is over an axis of the mesh, is waited for exactly once, before its result
        is read, and so is each copy; what is gathered for one phase is not read in the other; each reduced gradient is
        the mean over its ranks, taken once. Raises VerificationError with the rule and the nodes around.
        """
        _check_order(program)
        _check_roles(program)
        late = _available_late(program)
        _check_returned(program, late)
        _check_layouts(program, self._layouts)
        for node in program.graph.nodes:
            for problem in _problems(node, late):
                raise VerificationError(f"{node.name} {problem}\n{surroundings(node)}")
        for node, problem in (*transfer_problems(program, self._mesh), *copy_problems(program)):
            raise VerificationError(f"{node.name} {problem}\n{surroundings(node)}")
        self._checker.check(program)
        return meaning_of(program, self._numbers, self._layouts)

    def check_same(self, before: Meaning, after: Meaning, program: Program) -> None:
        """Raises VerificationError with the first node at fault, if a program has no longer the meaning it had."""
        check_same(before, after, program, self._numbers)


def verify(
    program: Program,
    fake_mode: FakeTensorMode,
    mesh: Mapping[str, int] | None = None,
    layouts: Mapping[str, ParameterLayout] | None = None,
) -> None:
    """Check one program by itself: `Verifier.check`."""
    Verifier(fake_mode, mesh or {}, layouts or {}).check(program)


def _check_order(program: Program) -> None:
    """Every node reads what stands before it, in this graph."""
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        missing = [source for source in node.all_input_nodes if source not in seen]
        if missing:
            where = "which stands behind it" if missing[0].graph is program.graph else "which is no node of this graph"
            raise VerificationError(f"{node.name} reads {missing[0].name}, {where}\n{surroundings(node)}")
        seen.add(node)


def _check_roles(program: Program) -> None:
    placeholders, results = program.placeholders, program.results
    if len(placeholders) != len(program.inputs):
        raise VerificationError(f"{len(placeholders)} inputs have {len(program.inputs)} roles")
    if len(results) != len(program.outputs):
        raise VerificationError(f"{len(results)} outputs have {len(program.outputs)} roles")
    for what, roles in (("input", Counter(program.inputs)), ("output", Counter(program.outputs))):
        for role, count in roles.items():
            if count > 1:
                raise VerificationError(f"{count} {what}s have the role '{role}'")
    for role, node in zip(program.outputs, results, strict=True):
        if node is None and role.kind not in GRADIENTS:
            raise VerificationError(f"output '{role}' has no value; only a gradient may be missing")
    for role in program.inputs:
        if role.kind is InputKind.CONSTANT and role.name not in program.constants:
            raise VerificationError(f"input '{role}' has no value among the program's constants")


def _check_returned(program: Program, late: set[fx.Node]) -> None:
    """What forward returns is there before backward runs."""
    for role, node in zip(program.outputs, program.results, strict=True):
        if role.kind not in GRADIENTS and node in late:
            raise VerificationError(f"output '{role}' is {node.name} of the backward phase; forward returns it")


def _check_layouts(program: Program, layouts: Mapping[str, ParameterLayout]) -> None:
    """Shards have the shape and dtype of their layout, parameters its shape; so have reduced gradients."""
    for role, node in program.nodes_of(InputKind.SHARD, InputKind.PARAMETER):
        layout = layouts.get(role.name)
        if layout is not None:
            is_shard = role.kind is InputKind.SHARD
            _check_layout(str(role), node, layout, is_shard, exact=is_shard)
    for output, result in program.results_of(OutputKind.GRADIENT):
        layout = layouts.get(output.name)
        if result is not None and layout is not None and program.reduced and layout.ranks > 1:
            _check_layout(str(output), result, layout, not layout.is_whole, exact=True)


def _check_layout(what: str, node: fx.Node, layout: ParameterLayout, is_shard: bool, *, exact: bool) -> None:
    """exact: the dtype counts too; a whole parameter may be held in the dtype of the computation."""
    wanted = layout.shard_shape if is_shard else layout.shape
    value = node.meta["val"]
    if tuple(value.shape) != wanted or (exact and value.dtype != layout.dtype):
        found, said = f"{value.dtype} {tuple(value.shape)}", f"{layout.dtype} {wanted}"
        raise VerificationError(f"{what} is {found}; its layout says {said}\n{surroundings(node)}")


def _available_late(program: Program) -> set[fx.Node]:
    """What exists only once backward runs: its nodes, and the gradients that arrive."""
    if program.level is not Level.STEP:
        return set()
    return {*program.compute_nodes(Phase.BACKWARD), *(node for _, node in program.nodes_of(InputKind.TANGENT))}


def _problems(node: fx.Node, late: set[fx.Node]) -> Iterator[str]:
    if node.op not in ("call_function", "placeholder", "output"):
        yield f"is a {node.op} node; programs hold inputs and calls only"
    if node.op != "call_function":
        return
    if facts_of(node).phase is Phase.FORWARD and not late.isdisjoint(node.all_input_nodes):
        read = ", ".join(source.name for source in node.all_input_nodes if source in late)
        yield f"is a forward node and reads {read} of the backward phase"
    if effect_of(node) is Effect.MUTATING:
        yield "writes one of its arguments; programs are functional"
