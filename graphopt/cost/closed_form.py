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

from graphopt.cost.assumptions import Assumptions
from graphopt.cost.dominance import undominated
from graphopt.cost.lives import Around, lives_of
from graphopt.cost.symbolic_sizes import RANKS, SymbolicSizes
from graphopt.cost.transfers import Life
from graphopt.errors import GraphoptError
from graphopt.ir import ParameterLayout, Program
from graphopt.nearest import nearest

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

    def __init__(self, program: Program, lives: list[Life[sympy.Expr]], assumptions: Assumptions) -> None:
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
        """The sums that can be the largest."""
        kept = undominated(sums.rows.astype(np.float64) @ _products(self._sizes, self._assumptions.lowest))
        sizes = sympy.Matrix(self._sizes)
        return [
            Candidate(sums.nodes[index], sympy.expand((sympy.Matrix([sums.rows[index].tolist()]) * sizes)[0]))
            for index in kept
        ]


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
    assumptions = Assumptions.of(program, layouts or {})
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
