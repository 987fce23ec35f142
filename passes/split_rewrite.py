"""Rewriting a forward program for one rank: each call on its part, with moves in between."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.cost.splitting import Choice, Prices, requiring_grad, result_of
from graphopt.dimensions.forms import BALANCED, Form, Move, Part, moves
from graphopt.dimensions.local import localized_arguments
from graphopt.dimensions.signature import operands_of
from graphopt.dimensions.space import Space, Value, is_item, value_of
from graphopt.ir import Phase, Program, Split, explain
from graphopt.ir.context import FOLD, UNFOLD
from graphopt.ir.dispatch import COMBINE, DISPATCH
from graphopt.ir.moves import ALL_TO_ALL, ENTER, FIRST, GATHER, LEAVE, PART, SCATTER_SUM
from graphopt.passes.base import PassContext
from graphopt.passes.build import Builder
from graphopt.passes.split_dispatch import dispatched_ends
from graphopt.passes.split_local import Local
from graphopt.passes.split_locally import localize


def rewrite(
    program: Program, context: PassContext, space: Space, choice: Choice, axis: str, made_by: str
) -> Counter[str]:
    """Run every call as chosen. Returns how many moves of each kind that took."""
    builder = Builder(program, context, made_by)
    values = _Values(builder, space, choice, axis)
    replaced: list[fx.Node] = []
    for node in program.compute_nodes():
        if is_item(node):
            values.take_item(node)
            continue
        strategy = choice.strategies[node]
        forms = zip(operands_of(node), strategy.operands, strict=True)
        operands = [values.get(value_of(operand), form, node) for operand, form in forms]
        results = None
        if strategy.cut is None:
            _give(node, operands)
        elif node in space.signatures and strategy.cut.label in space.signatures[node].localized:
            with builder.before(node):
                results = localize(Local(builder, node, space.signatures[node], strategy, operands, axis, space.ranks))
            replaced.append(node)
        else:
            shapes = [values.local_shape((node, index), form) for index, form in enumerate(strategy.results)]
            run_on_part(builder, node, operands, shapes)
            explain(node, made_by, f"a rank of {axis} runs its part along {strategy.cut.label}")
        values.made(node, results, strategy.results)
    end = program.output_node
    returned = [
        values.get(value_of(node), form, end) if node is not None and form is not None else None
        for node, form in zip(program.results, choice.results, strict=True)
    ]
    outputs = [
        replace(role, splits=(*role.splits, Split(axis, space.ranks, form.dim))) if isinstance(form, Part) else role
        for role, form in zip(program.outputs, choice.results, strict=True)
    ]
    program.set_results(returned, outputs)
    _erase(replaced)
    return values.moved


def run_on_part(builder: Builder, node: fx.Node, operands: list[fx.Node], shapes: Sequence[tuple[int, ...]]) -> None:
    """Have a call take what the rank has of its operands, and give results of these shapes."""
    node.args, node.kwargs = localized_arguments(node, [operand.meta["val"].shape for operand in operands], shapes)
    _give(node, operands)
    builder.revalue(node)


def _erase(nodes: list[fx.Node]) -> None:
    """Remove calls that nothing reads any more, but for their own items."""
    for node in reversed(nodes):
        for item in list(node.users):
            node.graph.erase_node(item)
        node.graph.erase_node(node)


def _give(node: fx.Node, operands: list[fx.Node]) -> None:
    """Put `operands` in the place of the tensors that a call is given."""
    left = iter(operands)

    def given(argument: fx.Node) -> fx.Node:
        return next(left) if isinstance(argument.meta.get("val"), torch.Tensor) else argument

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    node.args, node.kwargs = args, kwargs


class _Values:
    """What there is of each value of the program as it was: the node that holds it, by form."""

    def __init__(self, builder: Builder, space: Space, choice: Choice, axis: str) -> None:
        self._builder = builder
        self._space = space
        self._choice = choice
        self._axis = axis
        self._have: dict[Value, dict[Form, fx.Node]] = defaultdict(dict)
        self._forms: dict[Value, Form] = {}
        self._sources: dict[Value, dict[Form, Form]] = {}
        self._shapes = _shapes(builder.program)
        self._all_ends: dict[Value, fx.Node] = {}
        self.moved: Counter[str] = Counter()
        prices = Prices(builder.context.hardware, builder.context.hardware.link_of(axis), space.ranks)
        self._tracked = requiring_grad(builder.program)
        for value, forms in _wanted(builder.program, space, choice).items():
            _, steps = prices.having(result_of(value), choice.form_of(value), forms, value in self._tracked)
            self._sources[value] = {form: source for source, form in steps}
        for node, form in choice.inputs.items():
            if isinstance(form, Part):
                value = node.meta["val"]
                node.meta["val"] = builder.fake(self.local_shape((node, 0), form), value.dtype, node)
            self._have[node, 0][form] = node

    def get(self, value: Value, form: Form, reader: fx.Node) -> fx.Node:
        """The node that holds a value in a form, made before `reader` if there is none."""
        have = self._have[value]
        if form not in have:
            source = self._sources[value][form]
            node = self.get(value, source, reader)
            steps = moves(source, form, self._shapes[value], self._space.ranks)
            assert steps is not None
            for move, reached in steps:
                if reached not in have:
                    with self._builder.before(reader):
                        have[reached] = self._move(move, value, source, reached, node, reader)
                node, source = have[reached], reached
        return have[form]

    def made(self, node: fx.Node, results: Sequence[fx.Node | None] | None, forms: Sequence[Form]) -> None:
        """State in which forms a call gives its results, which `results` hold; None if it still does itself."""
        if results is None and isinstance(node.meta["val"], torch.Tensor):
            results = [node]
        for index, form in enumerate(forms):
            if results is None:
                self._forms[node, index] = form
            elif (result := results[index]) is not None:
                self._have[node, index][form] = result

    def take_item(self, item: fx.Node) -> None:
        """An item of a call with several results: it is one of the values, if the call is still there."""
        value = value_of(item)
        if value in self._forms:
            item.meta["val"] = value[0].meta["val"][value[1]]
            self._have[value].setdefault(self._forms[value], item)

    def local_shape(self, value: Value, form: Form) -> tuple[int, ...]:
        """The shape of what a rank holds."""
        shape = list(self._shapes[value])
        if isinstance(form, Part):
            shape[form.dim] = form.blocks * form.chunk
        return tuple(shape)

    def _move(self, move: Move, value: Value, source: Form, reached: Form, node: fx.Node, reader: fx.Node) -> fx.Node:
        """One move of a value, for `reader`."""
        if move is Move.ENTER and value not in self._tracked:
            return node  # forward, the two are one
        self.moved[move.title] += 1
        if move in (Move.DISPATCH, Move.COMBINE, Move.DISPATCH_ENDS):
            made = self._dispatch(move, reached, node, reader)
        else:
            target, arguments = _call(move, source, reached, self._shapes[value], self._space.ranks)
            node = self._reordered(FOLD, node, reached, reader)
            made = self._builder.call(
                target, node, *arguments, self._axis, *_varying(move), like=reader, phase=Phase.FORWARD
            )
            made = self._reordered(UNFOLD, made, source, reader)
        explain(
            made, self._builder.made_by, f"{_said(source)} to {_said(reached)} over {self._axis}, for {reader.name}"
        )
        return made

    def _dispatch(self, move: Move, reached: Form, node: fx.Node, reader: fx.Node) -> fx.Node:
        """Rows to where their groups are, or back; or where the groups of those that come end."""
        assert isinstance(reached, Part) and reached.order is not None
        assert isinstance(reached.order.ends, fx.Node)
        ends = self._ends(value_of(reached.order.ends), reader)
        if move is Move.DISPATCH_ENDS:
            return dispatched_ends(self._builder, ends, reached.chunk, self._space.ranks, self._axis, reader)
        target = DISPATCH if move is Move.DISPATCH else COMBINE
        rows = reached.blocks * reached.chunk
        return self._builder.call(
            target, node, ends, rows, self._space.ranks, self._axis, like=reader, phase=Phase.FORWARD
        )

    def _ends(self, value: Value, reader: fx.Node) -> fx.Node:
        """Where the groups of every rank end, gathered once."""
        if value not in self._all_ends:
            own = self._have[value][self._choice.form_of(value)]
            groups = own.meta["val"].shape[0] * self._space.ranks
            arguments = (0, 1, groups, self._space.ranks, self._axis, False)
            self._all_ends[value] = self._builder.call(GATHER, own, *arguments, like=reader, phase=Phase.FORWARD)
        return self._all_ends[value]

    def _reordered(self, target: Callable[..., Any], node: fx.Node, form: Form, reader: fx.Node) -> fx.Node:
        """A whole value in the order of balanced parts, or from that in its own."""
        if not isinstance(form, Part) or form.order is not BALANCED:
            return node
        return self._builder.call(
            target, node, form.dim, form.blocks, self._space.ranks, like=reader, phase=Phase.FORWARD
        )


def _call(
    move: Move, source: Form, reached: Form, shape: tuple[int, ...], ranks: int
) -> tuple[Callable[..., Any], list[int]]:
    """The operator of a move, and its arguments between the value and the axis."""
    if move in (Move.ENTER, Move.LEAVE, Move.FIRST):
        return {Move.ENTER: ENTER, Move.LEAVE: LEAVE, Move.FIRST: FIRST}[move], []
    if move is Move.ALL_TO_ALL:
        assert isinstance(source, Part) and isinstance(reached, Part)
        return ALL_TO_ALL, [reached.dim, source.dim, ranks]
    if move in (Move.GATHER, Move.GATHER_VARYING):
        assert isinstance(source, Part)
        return GATHER, [source.dim, source.blocks, shape[source.dim] // source.blocks, ranks]
    assert isinstance(reached, Part)
    target = SCATTER_SUM if move is Move.SCATTER_SUM else PART
    return target, [reached.dim, reached.blocks, reached.chunk, ranks]


def _varying(move: Move) -> list[bool]:
    if move in (Move.GATHER, Move.PART):
        return [False]
    return [True] if move in (Move.GATHER_VARYING, Move.PART_VARYING) else []


def _said(form: Form) -> str:
    """A form in words."""
    if not isinstance(form, Part):
        return form.value
    order = "" if form.order is None else f"{form.order.standing.value} "
    return f"{order}parts of dimension {form.dim}" + (f" in {form.blocks} blocks" if form.blocks > 1 else "")


def _wanted(program: Program, space: Space, choice: Choice) -> dict[Value, list[Form]]:
    """The forms in which each value is read, but for that in which it is made."""
    found: defaultdict[Value, dict[Form, None]] = defaultdict(dict)
    for value, uses in space.uses.items():
        for node, index in uses:
            found[value][choice.strategies[node].operands[index]] = None
    for result, form in zip(program.results, choice.results, strict=True):
        if result is not None and form is not None:
            found[value_of(result)][form] = None
    return {value: [form for form in forms if form != choice.form_of(value)] for value, forms in found.items()}


def _shapes(program: Program) -> dict[Value, tuple[int, ...]]:
    """Of every value, as it is whole."""
    found: dict[Value, tuple[int, ...]] = {}
    for node in [*program.placeholders, *program.compute_nodes()]:
        value = node.meta["val"]
        for index, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(tensor, torch.Tensor) and not is_item(node):
                found[node, index] = tuple(tensor.shape)
    return found
