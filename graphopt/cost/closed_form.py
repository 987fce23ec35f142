"""The peak of a step's memory as an expression over batch, sequence and ranks; no size is traced twice.

The program of one capture is good for all sizes that its guards admit, and lives do not depend on sizes. So the bytes
alive at a node are a sum of expressions, and the peak is the largest of those sums. Ranks are a symbol too, as far as
the program is the same for any number of them: where parameters are padded, the passes make other programs than where
they are not, so only ranks by which as many divide are admitted.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy  # type: ignore[import-untyped]
import torch

from graphopt._torch import shape_guards, shape_guards_hold, symbol_example, symbol_range, symbolic_expression
from graphopt.cost.lives import Around, lives_of
from graphopt.cost.symbolic_sizes import RANKS, SymbolicSizes
from graphopt.cost.transfers import Life
from graphopt.errors import GraphoptError
from graphopt.ir import InputKind, ParameterLayout, Program
from graphopt.ir.collectives import collectives_of, sources_of
from graphopt.nearest import nearest

_DIMENSIONS = {0: "batch", 1: "sequence"}
_ALONE = Around()


@dataclass(frozen=True)
class Candidate:
    """Where the peak may be: at the named node, with so many bytes alive."""

    node: str
    bytes: sympy.Expr


@dataclass(frozen=True)
class Peak:
    """A closed form at certain sizes, in bytes on one rank."""

    sizes: dict[str, int]
    peak_bytes: int
    by_category: dict[str, int]


@dataclass(frozen=True)
class _Sums:
    """Sums of storages' sizes, each a row: how many storages of each size. nodes: where the sum is first alive."""

    rows: np.ndarray[Any, np.dtype[np.int64]]
    nodes: list[str]


class ClosedForm:
    """The memory of a step program over symbols. example: their values in the capture; lowest: the least admitted."""

    def __init__(self, program: Program, lives: list[Life[sympy.Expr]], assumptions: "_Assumptions") -> None:
        nodes = [node.name if node.op == "call_function" else "inputs" for node in program.graph.nodes]
        self._sizes = list(dict.fromkeys(life.size for life in lives))
        self._assumptions = assumptions
        column = {size: index for index, size in enumerate(self._sizes)}
        kinds = dict.fromkeys(life.category for life in lives)
        alive = {kind: _alive((x for x in lives if x.category == kind), column, len(nodes)) for kind in kinds}
        self._of_category = {kind: _distinct(rows, nodes) for kind, rows in alive.items()}
        self._in_all = _distinct(sum(alive.values(), np.zeros((len(nodes), len(column)), np.int64)), nodes)

    @property
    def example(self) -> dict[str, int]:
        return dict(self._assumptions.example)

    @functools.cached_property
    def candidates(self) -> list[Candidate]:
        """Where the peak may be: at each for some sizes at least as much as at the others, as far as signs tell."""
        return self._undominated(self._in_all)

    @property
    def peak(self) -> sympy.Expr:
        """Bytes at the peak."""
        return _most(self.candidates)

    @functools.cached_property
    def by_category(self) -> dict[str, sympy.Expr]:
        """The most bytes of each category that are alive at one time."""
        return {kind: _most(self._undominated(sums)) for kind, sums in self._of_category.items()}

    def at(self, **sizes: int) -> Peak:
        """The peak at such sizes, by name; those not given are as in the example.

        Raises GraphoptError for an unknown name, and for sizes at which another program would be made.
        """
        for name in sizes:
            if name not in self.example:
                raise GraphoptError(f"no size of the program is called {name!r}; {nearest(name, list(self.example))}")
        given = {**self.example, **sizes}
        self._assumptions.check(given)
        values = {self._assumptions.symbols[name]: sympy.Integer(size) for name, size in given.items()}
        each = np.array([int(size.xreplace(values)) for size in self._sizes], np.int64)
        by_category = {kind: int((sums.rows @ each).max()) for kind, sums in self._of_category.items()}
        return Peak(given, int((self._in_all.rows @ each).max()), {k: v for k, v in by_category.items() if v})

    def to_dict(self) -> dict[str, Any]:
        """The expressions as text that `sympy.sympify` reads."""
        return {
            "example": self.example,
            "peak": str(self.peak),
            "candidates": [{"node": each.node, "bytes": str(each.bytes)} for each in self.candidates],
            "by_category": {kind: str(size) for kind, size in self.by_category.items()},
        }

    def _undominated(self, sums: _Sums) -> list[Candidate]:
        """The sums that no other exceeds at all sizes: none has in every product of symbols at least as much."""
        rows = sums.rows.astype(np.float64) @ _products(self._sizes, self._assumptions.lowest)
        kept: list[int] = []
        for index in np.argsort(-rows.sum(axis=1), kind="stable"):
            if not any((rows[other] >= rows[index]).all() for other in kept):
                kept.append(int(index))
        sizes = sympy.Matrix(self._sizes)
        return [
            Candidate(sums.nodes[index], sympy.expand((sympy.Matrix([sums.rows[index].tolist()]) * sizes)[0]))
            for index in kept
        ]


@dataclass(frozen=True)
class _Assumptions:
    """What a program takes for granted of the sizes.

    symbols: by name. lowest: the least value of each symbol. divides: name -> a number, and whether it divides by the
    number of ranks.
    """

    program: Program
    symbols: dict[str, sympy.Symbol]
    example: dict[str, int]
    lowest: dict[sympy.Symbol, int]
    renamed: dict[sympy.Symbol, sympy.Symbol]
    divides: dict[str, tuple[int, bool]]

    @classmethod
    def of(cls, program: Program, layouts: Mapping[str, ParameterLayout]) -> "_Assumptions":
        found = cls(program, {}, {}, {}, {}, {})
        for _, node in program.nodes_of(InputKind.BATCH):
            sizes = node.meta["val"].shape if isinstance(node.meta["val"], torch.Tensor) else ()
            for dimension, size in enumerate(sizes):
                if not isinstance(size, int):
                    found._name(size, (_DIMENSIONS.get(dimension, ""), f"{node.name}_{dimension}"))
        ranks = {layout.ranks for layout in layouts.values() if layout.ranks > 1}
        if ranks:
            (found.example["ranks"],) = ranks
            found.symbols["ranks"] = RANKS
            found.lowest[RANKS] = 2
            found._assume_divisions(layouts)
        return found

    def _name(self, size: torch.SymInt, names: tuple[str, str]) -> None:
        """Give a symbol the first of `names` that is free, or stands for a dimension of the same size."""
        expression = symbolic_expression(size)
        if not isinstance(expression, sympy.Symbol) or expression in self.renamed:
            return
        example = symbol_example(size, expression)
        name = next(name for name in names if name and self.example.get(name, example) == example)
        symbol = sympy.Symbol(name, integer=True, positive=True)
        self.renamed[expression] = self.symbols[name] = symbol
        self.example[name] = example
        self.lowest[symbol] = max(symbol_range(size, expression)[0] or 0, self.lowest.get(symbol, 0))

    def _assume_divisions(self, layouts: Mapping[str, ParameterLayout]) -> None:
        sharded = {role.name for role, _ in self.program.nodes_of(InputKind.SHARD)}
        for name in sorted(sharded):
            self.divides[f"the rows of {name}"] = (layouts[name].rows, not layouts[name].is_padded)
        for collective in collectives_of(self.program):
            sources = sources_of(collective.node)
            if collective.kind == "all-reduce" and len(sources) == 1:
                elements = int(sources[0].meta["val"].numel())
                self.divides[f"the elements of {sources[0].name}"] = (elements, elements % self.example["ranks"] == 0)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises GraphoptError if another program would be made for these sizes."""
        for name, size in sizes.items():
            if size < max(1, self.lowest[self.symbols[name]]):
                least = max(1, self.lowest[self.symbols[name]])
                raise GraphoptError(
                    f"{name}={size} wants a program of its own; the nearest that this serves is {least}"
                )
        ranks = sizes.get("ranks", 1)
        for what, (number, divides) in self.divides.items():
            if (number % ranks == 0) != divides:
                raise GraphoptError(
                    f"{what}, {number}, {'do not ' if divides else ''}divide by {ranks} ranks, other than by "
                    f"{self.example['ranks']}: padding makes another program, so compile it for {ranks} ranks"
                )
        self._check_guards({self.symbols[name]: sympy.Integer(size) for name, size in sizes.items()})

    def _check_guards(self, values: Mapping[sympy.Symbol, sympy.Integer]) -> None:
        if not self.renamed:
            return
        back = {symbol: values[name] for symbol, name in self.renamed.items()}
        fakes = [n.meta["val"] for _, n in self.program.nodes_of(InputKind.BATCH)]
        guards = shape_guards(fakes[0].fake_mode, fakes)
        shapes = [
            [s if isinstance(s, int) else int(symbolic_expression(s).xreplace(back)) for s in f.shape] for f in fakes
        ]
        tensors = [torch.empty(shape, device="meta") for shape in shapes]
        if guards and not shape_guards_hold(fakes[0].fake_mode, guards, tensors):
            said = ", ".join(f"{symbol}={value}" for symbol, value in values.items())
            raise GraphoptError(f"{said} break what capture assumed of symbolic sizes: {guards}")


def closed_form(
    program: Program,
    mesh: Mapping[str, int],
    layouts: Mapping[str, ParameterLayout] | None = None,
    shared_axes: frozenset[str] = frozenset(),
    *,
    around: Around = _ALONE,
    allocation_bytes: int = 1,
) -> ClosedForm:
    """The memory of a step program over its symbols: ``batch`` and ``sequence`` for the sizes of the first and second
    dimension of batch tensors that were captured as dynamic, ``ranks`` for those that share the parameters.

    layouts: how parameters lie over the ranks; without them the number of ranks is that of the mesh. The rest is as in
    `graphopt.cost.memory.memory`. Of ranks it is assumed that buckets hold the same parameters for any number, and
    shared segments are as many. Raises GraphoptError where a size depends on ranks in ways that are not known.
    """
    assumptions = _Assumptions.of(program, layouts or {})
    sizes = SymbolicSizes(program, mesh, layouts or {}, assumptions.renamed)
    lives = lives_of(program, mesh, shared_axes, sizes, around)
    if allocation_bytes > 1:
        lives = [_rounded(life, allocation_bytes) for life in lives]
    return ClosedForm(program, lives, assumptions)


def _rounded(life: Life[sympy.Expr], multiple: int) -> Life[sympy.Expr]:
    size = multiple * sympy.ceiling(life.size / multiple)
    return Life(life.owner, life.category, size, life.first, life.last)


def _alive(lives: Iterable[Life[sympy.Expr]], column: Mapping[sympy.Expr, int], length: int) -> Any:
    """[positions, sizes]: how many storages of each size are alive."""
    change = np.zeros((length + 1, len(column)), np.int64)
    for life in lives:
        change[life.first, column[life.size]] += 1
        change[length if life.last is None else life.last + 1, column[life.size]] -= 1
    return np.cumsum(change, axis=0)[:-1]


def _distinct(rows: Any, nodes: list[str]) -> _Sums:
    found, first = np.unique(rows, axis=0, return_index=True)
    return _Sums(found, [nodes[index] for index in first])


def _products(sizes: list[sympy.Expr], lowest: Mapping[sympy.Symbol, int]) -> Any:
    """[sizes, products]: factors of products of symbols, each counted from its least value and so never negative."""
    above = {s: s + least for s, least in lowest.items() if s is not RANKS}
    products = [sympy.expand(size.xreplace(above)).as_coefficients_dict() for size in sizes]
    terms = list(dict.fromkeys(term for each in products for term in each))
    return np.array([[float(each[term]) for term in terms] for each in products])


def _most(candidates: list[Candidate]) -> sympy.Expr:
    """The largest of them, which is not looked for."""
    each = [candidate.bytes for candidate in candidates]
    return each[0] if len(each) == 1 else sympy.Max(*each, evaluate=False)
