"""Value numbers: two values with one number are computed by the same operations from the same inputs.

Communication is set aside: a gathered parameter is the parameter, whichever buckets it came in, a repeated pure
operation is the operation, and the spellings of a view are one. So a pass that only moves, shares or repeats work
leaves every number as it was, which is how it is checked without running anything (translation validation: Necula, PLDI
2000; value numbering: Alpern, Wegman and Zadeck, POPL 1988).
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.ir.collectives import WAIT, launch_of, sources_of
from graphopt.ir.copies import COPIES
from graphopt.ir.effects import Effect, effect_of, is_view, stops_gradient
from graphopt.ir.layout import ParameterLayout
from graphopt.ir.program import Level, Program
from graphopt.ir.roles import InputKind
from graphopt.ir.values import is_alike

aten = torch.ops.aten
_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
_REPEATABLE = frozenset({Effect.PURE, Effect.COLLECTIVE, Effect.COPY})

Key = tuple[Any, ...]


class ValueNumbers:
    """Gives out numbers; programs numbered by one instance can be compared.

    layouts: how each parameter lies over the ranks.
    """

    def __init__(self, layouts: Mapping[str, ParameterLayout]) -> None:
        self._layouts = layouts
        self._number: dict[Key, int] = {}
        self._key: list[Key] = []

    def key(self, number: int) -> Key:
        """What a number stands for: an operation's name or an operator, then its arguments."""
        return self._key[number]

    def number(self, key: Key) -> int:
        """The number of an operation over arguments; a new one if it was not seen before."""
        found = self._number.setdefault(key, len(self._key))
        if found == len(self._key):
            self._key.append(key)
        return found

    def of(self, program: Program) -> dict[fx.Node, int]:
        """The number of every input and every call of a program."""
        numbers: dict[fx.Node, int] = {}
        for role, node in zip(program.inputs, program.placeholders, strict=True):
            numbers[node] = self.number(("input", role.kind, role.name))
        occurrences: dict[object, int] = {}
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            # Until gradients are explicit, a value without gradient is another than the one it was taken of.
            is_stop = stops_gradient(node) and program.level is Level.FORWARD
            key = self._plain(node, numbers) if is_stop else self._key_of(node, numbers)
            if effect_of(node) not in _REPEATABLE:  # each time it runs it gives, or does, something else
                occurrences[key] = occurrences.get(key, -1) + 1
                key = ("occurrence", occurrences[key], key)
            numbers[node] = key if isinstance(key, int) else self.number(key)
        return numbers

    def _key_of(self, node: fx.Node, numbers: Mapping[fx.Node, int]) -> Any:
        """The key of a call, or the number of an earlier value that it equals."""
        target = node.target
        if target is aten.alias.default or target in COPIES or stops_gradient(node) or _is_identity(node):
            return numbers[node.all_input_nodes[0]]
        if target is WAIT:
            return self._awaited(node, numbers)
        if target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            return self._cast(numbers[node.all_input_nodes[0]], node.kwargs["dtype"])
        if target in _RESHAPES:
            return self._reshaped(numbers[node.all_input_nodes[0]], _sizes(node))
        if target is aten.slice.Tensor and node.args[1:3] == (0, 0) and len(node.args) == 4:
            return self._without_padding(numbers[node.all_input_nodes[0]], node, numbers)
        if target is aten.copy.default:
            return self._copied(node, numbers)
        return self._plain(node, numbers)

    def _plain(self, node: fx.Node, numbers: Mapping[fx.Node, int]) -> Key:
        arguments = _frozen(node.args, numbers)
        return (node.target, arguments, _frozen(node.kwargs, numbers)) if node.kwargs else (node.target, arguments)

    def _cast(self, source: int, dtype: Any) -> int:
        return self.number(("cast", source, dtype))

    def _copied(self, node: fx.Node, numbers: Mapping[fx.Node, int]) -> int:
        """A copy into a value is the copied one in its dtype and shape."""
        into, value = node.args[0], node.args[1]
        assert isinstance(into, fx.Node) and isinstance(value, fx.Node)
        number = numbers[value]
        if _sizes(value) != _sizes(into):
            number = self.number((aten.expand_as.default, ("list", ("node", number), ("node", numbers[into]))))
        if value.meta["val"].dtype != into.meta["val"].dtype:
            number = self._cast(number, into.meta["val"].dtype)
        return number

    def _awaited(self, wait: fx.Node, numbers: Mapping[fx.Node, int]) -> Any:
        """What a collective gives: the rows of a parameter, what other ranks hold, or a sum over ranks."""
        launched = launch_of(wait.args[0]) if isinstance(wait.args[0], fx.Node) else None
        if launched is None:
            return self._plain(wait, numbers)
        collective, index = launched
        if not 0 <= index < len(sources_of(collective.node)):
            return self._plain(wait, numbers)
        source = numbers[sources_of(collective.node)[index]]
        if collective.reduction is not None:
            return (collective.reduction, collective.kind, collective.axis, source)
        if collective.kind == "all-to-all":
            return ("exchange", collective.axis, source)
        if collective.kind in ("dispatch", "combine"):
            _, ends, rows, *_ = collective.node.args
            assert isinstance(ends, fx.Node)
            return (collective.kind, collective.axis, source, numbers[ends], str(rows))
        name = self._shard_name(source)
        layout = self._layouts.get(name) if name is not None else None
        if name is None or layout is None or layout.axis != collective.axis:
            return ("gather", collective.axis, source)
        return self._part(name, source, layout.gathered_shape)

    def _shard_name(self, number: int) -> str | None:
        """The parameter whose shard this is, or is a cast of."""
        key = self.key(number)
        while key[0] == "cast":
            key = self.key(key[1])
        return str(key[2]) if key[0] == "input" and key[1] is InputKind.SHARD else None

    def _part(self, name: str, source: int, shape: tuple[int, ...]) -> int:
        """A gathered parameter in `shape`; the parameter itself, cast as its shard was, where that is its own."""
        if shape != self._layouts[name].shape:
            return self.number(("rows", name, source, shape))
        casts = []
        key = self.key(source)
        while key[0] == "cast":
            casts.append(key[2])
            key = self.key(key[1])
        number = self.number(("input", InputKind.PARAMETER, name))
        for dtype in reversed(casts):
            number = self._cast(number, dtype)
        return number

    def _reshaped(self, source: int, shape: tuple[Any, ...]) -> int:
        key = self.key(source)
        if key[0] == "rows" and shape == self._layouts[key[1]].shape and _covers(key[3], shape):
            return self._part(key[1], key[2], shape)
        return self.number(("reshape", source, shape))

    def _without_padding(self, source: int, node: fx.Node, numbers: Mapping[fx.Node, int]) -> Any:
        key = self.key(source)
        if key[0] == "rows" and node.args[3] == self._layouts[key[1]].rows:
            return self._part(key[1], key[2], (self._layouts[key[1]].rows, *key[3][1:]))
        return self._plain(node, numbers)


def _covers(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return torch.Size(one).numel() == torch.Size(other).numel()


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a value; symbols by their expression, so that comparing adds no guard."""
    return tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape)


def _is_identity(node: fx.Node) -> bool:
    """Whether a view looks just like what it is taken of."""
    if node.target is operator.getitem or not is_view(node):
        return False
    return is_alike(node.all_input_nodes[0].meta.get("val"), node.meta.get("val"))


def _frozen(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """Arguments as a key; values by their numbers."""
    if isinstance(value, fx.Node):
        return ("node", numbers[value])
    if isinstance(value, (list, tuple)):
        return ("list", *(_frozen(item, numbers) for item in value))
    if isinstance(value, dict):
        return ("dict", *((name, _frozen(item, numbers)) for name, item in sorted(value.items())))
    if isinstance(value, slice):
        return ("slice", _frozen((value.start, value.stop, value.step), numbers))
    return (type(value), repr(value) if isinstance(value, float) else value)  # nan, and -0.0
