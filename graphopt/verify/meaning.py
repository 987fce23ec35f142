"""What a program computes, as value numbers, and the first place where another one differs."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from graphopt.errors import VerificationError
from graphopt.ir.effects import Effect, effect_of
from graphopt.ir.layout import ParameterLayout
from graphopt.ir.program import Program
from graphopt.ir.roles import Output, OutputKind
from graphopt.verify.means import NotTheMean, local_gradient
from graphopt.verify.surroundings import surroundings
from graphopt.verify.value_numbers import ValueNumbers


@dataclass(frozen=True)
class Meaning:
    """The numbers of a program's outputs (of gradients before they are reduced), of its draws, of all its values."""

    outputs: dict[Output, int | None]
    draws: list[int]
    values: frozenset[int]


def meaning_of(program: Program, values: ValueNumbers, layouts: Mapping[str, ParameterLayout]) -> Meaning:
    """Raises VerificationError if the program reduces gradients, and one is not the mean over its ranks."""
    numbers = values.of(program)
    outputs: dict[Output, int | None] = {}
    for role, node in zip(program.outputs, program.results, strict=True):
        outputs[role] = None if node is None else numbers[node]
        layout = layouts.get(role.name) if role.kind is OutputKind.GRADIENT else None
        if node is None or layout is None or layout.ranks == 1 or not program.reduced:
            continue
        try:
            outputs[role] = local_gradient(values, numbers[node], layout)
        except NotTheMean as error:
            raise VerificationError(f"{role} {error}\n{surroundings(node)}") from error
    draws = [numbers[n] for n in program.graph.nodes if n.op == "call_function" and effect_of(n) is Effect.RANDOM]
    return Meaning(outputs, draws, frozenset(numbers.values()))


def check_same(before: Meaning, after: Meaning, program: Program, values: ValueNumbers) -> None:
    """Raises VerificationError with the first node that computes something new, if `program` has another meaning."""
    if before.outputs.keys() != after.outputs.keys():
        gone = ", ".join(str(role) for role in before.outputs.keys() ^ after.outputs.keys())
        raise VerificationError(f"the outputs are others: {gone}")
    for role, number in after.outputs.items():
        if number != before.outputs[role]:
            raise VerificationError(
                f"{role} is computed otherwise than before{_where(number, before, program, values)}"
            )
    if before.draws != after.draws:
        raise VerificationError(
            f"{len(after.draws)} random values are drawn, or in another order; before, {len(before.draws)} were"
        )


def _where(number: int | None, before: Meaning, program: Program, values: ValueNumbers) -> str:
    """The earliest node behind `number` that computes what the program did not compute before."""
    numbers = values.of(program)
    node = next((n for n in program.graph.nodes if numbers.get(n) == number), None)
    if node is None or number in before.values:
        return "" if node is None else f": it is {node.name}\n{surroundings(node)}"
    while True:
        source = _first_new(node, before, numbers)
        if source is None:
            return f", from {node.name} on\n{surroundings(node)}"
        node = source


def _first_new(node: fx.Node, before: Meaning, numbers: Mapping[fx.Node, int]) -> fx.Node | None:
    calls = (source for source in node.all_input_nodes if source.op == "call_function")
    return next((source for source in calls if numbers[source] not in before.values), None)
