"""What a program takes for granted of the sizes that are symbols in it."""

from collections.abc import Mapping
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
import torch

from graphopt._torch import shape_guards, shape_guards_hold, symbol_example, symbol_range, symbolic_expression
from graphopt.cost.symbolic_sizes import RANKS
from graphopt.errors import GraphoptError
from graphopt.ir import InputKind, ParameterLayout, Program
from graphopt.ir.collectives import collectives_of, sources_of

_DIMENSIONS = {0: "batch", 1: "sequence"}


@dataclass(frozen=True)
class Assumptions:
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
    def of(cls, program: Program, layouts: Mapping[str, ParameterLayout]) -> "Assumptions":
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
