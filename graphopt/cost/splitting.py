"""What it costs to run calls in this or that form over an axis, and the choice that costs least."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.cost.assignment import Costs, Table, least_cost
from graphopt.cost.hardware import Hardware, Link
from graphopt.dimensions.forms import REPLICATED, Form, Part, moves
from graphopt.dimensions.signature import Signature
from graphopt.dimensions.space import Space, Value, result_count, value_of
from graphopt.dimensions.strategies import Strategy
from graphopt.ir import Program
from graphopt.ir.values import byte_size, in_example

_UNSPLIT = 1e4  # a product that every rank computes whole costs so many times what it takes: the axis is there to split
_STATE_TRAFFIC = 7  # times that a step reads or writes each parameter's bytes: gradient, two moments, parameter
_BACKWARD = 2  # times the work of forward
_MOST_FORMS = 2  # of one value at a time


@dataclass(frozen=True)
class Choice:
    """strategies: of each call. inputs: how each lies. results: the form in which each result is returned.

    seconds: of what depends on it, communication and work.
    """

    strategies: Mapping[fx.Node, Strategy]
    inputs: Mapping[fx.Node, Form]
    results: tuple[Form | None, ...]
    seconds: float

    def form_of(self, value: Value) -> Form:
        """The form in which a value is made."""
        node, index = value
        return self.inputs[node] if node in self.inputs else self.strategies[node].results[index]


def best_choice(
    program: Program,
    space: Space,
    hardware: Hardware,
    axis: str,
    is_split_wanted: Callable[[fx.Node], bool],
    may_lie: Collection[int] = (),
) -> Choice:
    """The strategies of least time. is_split_wanted: whether a call is one that the axis is there to split.

    may_lie: results of the program, by number, that may be returned in equal parts. Raises GraphoptError if there are
    too many dependent choices to be made exactly.
    """
    problem = _Problem(program, space, hardware, hardware.link_of(axis), is_split_wanted, may_lie)
    found = least_cost(problem.sizes, problem.tables)
    return Choice(
        {node: ways[found.values[node]] for node, ways in space.calls.items()},
        {node: forms[found.values[node]] for node, forms in space.inputs.items()},
        tuple(
            None if forms is None else forms[found.values[_Result(index)]]
            for index, forms in enumerate(problem.results)
        ),
        found.cost,
    )


@dataclass(frozen=True)
class _Result:
    """The variable that says how a result of the program is returned."""

    index: int


class _Problem:
    """Variables: each call's strategy, how inputs and results lie, and the forms in which what many read is had."""

    def __init__(
        self,
        program: Program,
        space: Space,
        hardware: Hardware,
        link: Link,
        is_split_wanted: Callable[[fx.Node], bool],
        may_lie: Collection[int],
    ) -> None:
        self._space = space
        self._prices = Prices(hardware, link, space.ranks)
        self._tracked = requiring_grad(program)
        self.sizes: dict[Hashable, int] = {}
        self.tables: list[Table[Hashable]] = []
        self._kept: dict[Hashable, Costs] = {}
        for node, forms in space.inputs.items():
            self._add(node, [self._prices.lying(node.meta["val"], form) for form in forms])
        for node, strategies in space.calls.items():
            wanted = is_split_wanted(node)
            signature = space.signatures.get(node)
            self._add(node, [self._prices.work(node, signature, each, wanted) for each in strategies])
        self.results: list[list[Form] | None] = []
        returned: defaultdict[Value, list[tuple[Hashable, tuple[Form, ...]]]] = defaultdict(list)
        for index, result in enumerate(program.results):
            if result is None:
                self.results.append(None)
                continue
            value = value_of(result)
            lying: list[Form] = [REPLICATED, *(self._equal_parts(value) if index in may_lie else ())]
            self.results.append(lying)
            self._add(_Result(index), [0.0] * len(lying))
            returned[value].append((_Result(index), tuple(lying)))
        for value in dict.fromkeys([*space.uses, *returned]):
            self._connect(value, returned[value])

    def _add(self, variable: Hashable, costs: Sequence[float]) -> None:
        self.sizes[variable] = len(costs)
        self.tables.append(Table((variable,), np.array(costs)))

    def _equal_parts(self, value: Value) -> list[Form]:
        """The forms in which a value is made, and in which it could be put together from what the ranks have."""
        shape, ranks = _shape(result_of(value)), self._space.ranks
        even = [Part(dim, 1, size // ranks) for dim, size in enumerate(shape) if size % ranks == 0]
        return [form for form in dict.fromkeys(self._forms_made(value)) if form in even]

    def _connect(self, value: Value, returned: Sequence[tuple[Hashable, tuple[Form, ...]]]) -> None:
        """The cost of having a value in the forms in which it is read, or returned."""
        made = self._forms_made(value)
        uses = self._space.uses.get(value, [])
        readers: list[tuple[Hashable, tuple[Form, ...]]] = [
            (node, tuple(each.operands[at] for each in self._space.calls[node])) for node, at in uses
        ]
        readers += returned
        wanted = dict.fromkeys(form for _, forms in readers for form in forms)
        if len(readers) == 1:
            ((reader, forms),) = readers
            self._table((value[0], reader), self._costs(value, made, [(form,) for form in forms]))
            return
        states = [state for count in (1, _MOST_FORMS) for state in itertools.combinations(wanted, count)]
        self._add(value, [0.0] * len(states))
        self._table((value[0], value), self._costs(value, made, states))
        for reader, forms in readers:
            self._table((value, reader), _allowed(states, forms))

    def _table(self, variables: tuple[Hashable, Hashable], costs: Costs) -> None:
        self.tables.append(Table(variables, costs))

    def _forms_made(self, value: Value) -> tuple[Form, ...]:
        node, index = value
        if node in self._space.inputs:
            return tuple(self._space.inputs[node])
        return tuple(strategy.results[index] for strategy in self._space.calls[node])

    def _costs(self, value: Value, made: Sequence[Form], states: Sequence[tuple[Form, ...]]) -> Costs:
        """Of each form in which a value is made, and of each set of forms in which it is wanted."""
        tensor = result_of(value)
        tracked = value in self._tracked
        key = (_shape(tensor), tensor.dtype, tracked, tuple(made), tuple(states))
        if key not in self._kept:
            self._kept[key] = np.array(
                [[self._prices.having(tensor, form, state, tracked)[0] for state in states] for form in made]
            )
        return self._kept[key]


class Prices:
    """Seconds of what one rank does."""

    def __init__(self, hardware: Hardware, link: Link, ranks: int) -> None:
        self._hardware = hardware
        self._link = link
        self._ranks = ranks
        self._kept: dict[Hashable, float] = {}

    def lying(self, value: Any, form: Form) -> float:
        """Keeping a parameter, its gradient and the optimizer's state up to date."""
        if not isinstance(value, torch.Tensor):
            return 0.0
        seconds = _STATE_TRAFFIC * byte_size(value) / self._hardware.memory_bandwidth
        return seconds / self._ranks if isinstance(form, Part) else seconds

    def work(self, node: fx.Node, signature: Signature | None, strategy: Strategy, is_split_wanted: bool) -> float:
        """Forward and backward of a call."""
        if signature is None:
            return 0.0
        moved = sum(byte_size(each.meta["val"]) for each in node.all_input_nodes if _is_tensor(each))
        moved += byte_size(node.meta["val"])
        flops = _flops(signature) if is_split_wanted else 0
        dtype = _dtype(node)
        seconds = max(flops / self._hardware.peak(dtype), moved / self._hardware.memory_bandwidth) * (1 + _BACKWARD)
        if strategy.cut is None:
            return seconds * (_UNSPLIT if is_split_wanted else 1)
        size = signature.sizes.get(strategy.cut.label)
        return seconds * (1 / self._ranks if size is None else strategy.cut.blocks * strategy.cut.chunk / size)

    def having(
        self, tensor: torch.Tensor, form: Form, wanted: Sequence[Form], tracked: bool
    ) -> tuple[float, tuple[tuple[Form, Form], ...]]:
        """Making `wanted` of a value in `form`: what it costs, infinite if nothing leads there, and each from which."""
        return min(
            (self._in_order(tensor, form, order, tracked) for order in itertools.permutations(wanted)), key=_cost
        )

    def _in_order(
        self, tensor: torch.Tensor, form: Form, order: Sequence[Form], tracked: bool
    ) -> tuple[float, tuple[tuple[Form, Form], ...]]:
        steps: list[tuple[Form, Form]] = []
        total = 0.0
        for wanted in order:
            have = [form, *(made for _, made in steps)]
            cost, source = min(((self._moving(tensor, each, wanted, tracked), each) for each in have), key=_cost)
            total += cost
            steps.append((source, wanted))
        return total, tuple(steps)

    def _moving(self, tensor: torch.Tensor, source: Form, wanted: Form, tracked: bool) -> float:
        key = (_shape(tensor), tensor.dtype, source, wanted, tracked)
        if key not in self._kept:
            steps = moves(source, wanted, tuple(_shape(tensor)), self._ranks)
            self._kept[key] = (
                math.inf
                if steps is None
                else sum(
                    self._collective(move.forward, tensor)
                    + (self._collective(move.backward, tensor) if tracked else 0.0)
                    for move, _ in steps
                )
            )
        return self._kept[key]

    def _collective(self, kind: str, tensor: torch.Tensor) -> float:
        """A ring's latency and bytes; and memory's, for what only takes a part or fills it up."""
        size = byte_size(tensor)
        copied = size / self._hardware.memory_bandwidth
        if not kind:
            return copied
        rounds = (self._ranks - 1) * (2 if kind == "all-reduce" else 1)
        part = size / self._ranks / (self._ranks if kind == "all-to-all" else 1)
        return rounds * (self._link.latency + part / self._link.bandwidth) + copied


def result_of(value: Value) -> torch.Tensor:
    """The (fake) tensor that a value is."""
    found = value[0].meta["val"]
    tensor = found[value[1]] if isinstance(found, (list, tuple)) else found
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _flops(signature: Signature) -> int:
    """Of a product, or of a chain of them as attention is: two for each pair that is multiplied."""
    factors = [
        {label for dim in dimensions for label in dim}
        for index, dimensions in enumerate(signature.operands)
        if index not in signature.addends
    ]
    if any(signature.is_reduced(label) for label in signature.localized):
        return 0  # a lookup
    kept = {label for label in factors[0] if not signature.is_reduced(label)}
    pairs = [kept | factor for factor in factors[1:]]
    return sum(2 * math.prod(_number(signature.sizes[label]) for label in pair) for pair in pairs)


def _cost(priced: tuple[float, object]) -> float:
    return priced[0]


def _allowed(states: Sequence[tuple[Form, ...]], forms: Sequence[Form]) -> Costs:
    return np.array([[0.0 if form in state else math.inf for form in forms] for state in states])


def requiring_grad(program: Program) -> set[Value]:
    """Values to which a gradient comes."""
    found: set[Value] = set()
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        if role.requires_grad:
            found.add((node, 0))
    for node in program.compute_nodes():
        if any(value_of(source) in found for source in node.all_input_nodes):
            for index in range(result_count(node)):
                tensor = result_of((node, index)) if _is_tensor(node) or result_count(node) > 1 else None
                if tensor is not None and tensor.is_floating_point():
                    found.add((node, index))
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta["val"]
    first = value[0] if isinstance(value, (list, tuple)) else value
    return first.dtype if isinstance(first, torch.Tensor) else torch.float32


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(_number(size) for size in tensor.shape)


def _number(size: Any) -> int:
    return int(in_example(size))
