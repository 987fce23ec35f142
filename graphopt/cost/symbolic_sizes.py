"""Sizes as expressions: over the symbols of a capture with dynamic sizes, and over the number of ranks.

What depends on the ranks is read from the layouts: shards of parameters, what is computed from them element by
element, what is gathered from them and what gradients are reduced to.
"""

import math
import operator
from collections.abc import Iterable, Mapping

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from graphopt._torch import symbolic_expression
from graphopt.cost.sizes import Sizes
from graphopt.errors import GraphoptError
from graphopt.ir import InputKind, ParameterLayout, Program
from graphopt.ir.collectives import Collective, collective_of, sources_of
from graphopt.ir.liveness import shares_storage

RANKS = sympy.Symbol("ranks", integer=True, positive=True)


class SymbolicSizes(Sizes[sympy.Expr]):
    """names: the symbols of the capture -> those to write. layouts: of the parameters; without them ranks are numbers.

    Raises GraphoptError where a size depends on the number of ranks in a way that the layouts do not tell.
    """

    def __init__(
        self,
        program: Program,
        mesh: Mapping[str, int],
        layouts: Mapping[str, ParameterLayout],
        names: Mapping[sympy.Symbol, sympy.Symbol],
    ) -> None:
        self._names = names
        self._ranks: dict[str, sympy.Expr] = {axis: sympy.Integer(ranks) for axis, ranks in mesh.items()}
        self._ranks.update({layout.axis: RANKS for layout in layouts.values() if layout.ranks > 1})
        self._elements: dict[fx.Node, sympy.Expr] = {}
        for role, node in program.nodes_of(InputKind.SHARD):
            if role.name in layouts:
                self._elements[node] = _shard(layouts[role.name])
        if RANKS in self._ranks.values():
            for node in program.compute_nodes():
                self._derive(node)

    def value(self, value: torch.Tensor) -> sympy.Expr:
        return self._count(value) * value.element_size()

    def tensor(self, node: fx.Node) -> sympy.Expr:
        return self.in_dtype(node, node.meta["val"].dtype)

    def in_dtype(self, node: fx.Node, dtype: torch.dtype) -> sympy.Expr:
        elements = self._elements.get(node)
        return (self._count(node.meta["val"]) if elements is None else elements) * dtype.itemsize

    def scalar(self, dtype: torch.dtype) -> sympy.Expr:
        return sympy.Integer(dtype.itemsize)

    def total(self, sizes: Iterable[sympy.Expr]) -> sympy.Expr:
        return sympy.Add(*sizes)

    def times_ranks(self, size: sympy.Expr, axis: str) -> sympy.Expr:
        return size * self._ranks[axis]

    def share(self, collective: Collective) -> sympy.Expr:
        item = int(sources_of(collective.node)[0].meta["val"].element_size())
        return item * sympy.ceiling(self.sources(collective) / item / self._ranks[collective.axis])

    def padding(self, collective: Collective) -> sympy.Expr:
        return self.whole(collective) - self.sources(collective)

    def _count(self, value: torch.Tensor) -> sympy.Expr:
        sizes = (size if isinstance(size, int) else symbolic_expression(size) for size in value.shape)
        return sympy.Mul(*sizes).xreplace(self._names)

    def _derive(self, node: fx.Node) -> None:
        """Elements of what depends on the number of ranks: collectives, and what is computed from shards."""
        collective = collective_of(node)
        if collective is not None:
            if collective.kind == "reduce-scatter":
                for given in sources_of(node):
                    self._pad(given)
            return
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        launched = collective_of(source) if node.target is operator.getitem and source is not None else None
        if launched is not None:
            self._receive(node, launched)
            return
        sharded = [each for each in node.all_input_nodes if each in self._elements]
        if sharded and shares_storage(node):
            if _elements(node) == _elements(sharded[0]):  # else rows without their padding, whose number is known
                self._elements[node] = self._elements[sharded[0]]
        elif sharded:
            alike = [each for each in sharded if _elements(each) == _elements(node)]
            if not alike:
                raise GraphoptError(f"{node.name} changes the size of a shard, so it is not known for other ranks")
            self._elements[node] = self._elements[alike[0]]

    def _pad(self, source: fx.Node) -> None:
        """What is reduced to shards: rows for all ranks, the last ones padding."""
        if source.target is torch.ops.aten.constant_pad_nd.default and isinstance(source.args[0], fx.Node):
            rows, *row = source.args[0].meta["val"].shape
            self._elements[source] = RANKS * sympy.ceiling(sympy.Integer(rows) / RANKS) * math.prod(row)

    def _receive(self, item: fx.Node, collective: Collective) -> None:
        source = sources_of(collective.node)[item.args[1]]  # type: ignore[index]
        if collective.kind == "all-gather" and source in self._elements:
            whole = self._elements[source] * self._ranks[collective.axis]
            if whole.free_symbols:  # else all rows and no padding
                self._elements[item] = whole
        elif collective.kind == "reduce-scatter":
            whole = self._elements.get(source, sympy.Integer(_elements(source)))
            self._elements[item] = whole / self._ranks[collective.axis]


def _shard(layout: ParameterLayout) -> sympy.Expr:
    """Elements of a padded shard. Where rows divide by the ranks no rounding up is written."""
    rows = sympy.Integer(layout.rows) / RANKS
    return (sympy.ceiling(rows) if layout.is_padded else rows) * math.prod(layout.row_shape)


def _elements(node: fx.Node) -> int:
    return int(node.meta["val"].numel())
