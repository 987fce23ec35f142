"""Symbolic sizes as JSON values: numbers, names of symbols, and lists of a function's name and its arguments."""

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from graphopt._torch import (
    FakeTensorMode,
    declare_symbol,
    symbol_example,
    symbol_range,
    symbolic_expression,
    symbolic_function,
    symbolic_size,
)


class SymbolWriter:
    """Writes sizes, and collects what must be known of the symbols in them.

    declarations: name -> {example, bounds, positive}, to be given to `SymbolReader`.
    """

    def __init__(self) -> None:
        self.declarations: dict[str, dict[str, Any]] = {}

    def size(self, value: int | torch.SymInt) -> Any:
        """A size as JSON. Raises ValueError if its value in the example is not known."""
        return value if isinstance(value, int) else self._expression(symbolic_expression(value), value)

    def _expression(self, expression: sympy.Basic, value: torch.SymInt) -> Any:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            self._declare(expression, value)
            return expression.name
        if isinstance(expression, sympy.Rational):
            return ["Rational", expression.p, expression.q]
        if not expression.args:
            raise ValueError(f"has a size {value}, in which {expression} is neither a whole number nor a symbol")
        return [type(expression).__name__, *(self._expression(each, value) for each in expression.args)]

    def _declare(self, symbol: sympy.Symbol, value: torch.SymInt) -> None:
        if symbol.name in self.declarations:
            return
        try:
            example = symbol_example(value, symbol)
        except KeyError as error:
            raise ValueError(f"has a size {value} that depends on data; it has no value to be stored") from error
        self.declarations[symbol.name] = {
            "example": example,
            "bounds": list(symbol_range(value, symbol)),
            "positive": symbol.is_positive is True,
        }


class SymbolReader:
    """Makes sizes of a fake mode from what a `SymbolWriter` wrote."""

    def __init__(self, fake_mode: FakeTensorMode, declarations: dict[str, dict[str, Any]]) -> None:
        self._fake_mode = fake_mode
        self._symbols: dict[str, sympy.Symbol] = {}
        for name, facts in declarations.items():
            assumptions = {"positive": True} if facts["positive"] else {}
            symbol = sympy.Symbol(name, integer=True, **assumptions)
            lower, upper = facts["bounds"]
            declare_symbol(fake_mode, symbol, facts["example"], (lower, upper))
            self._symbols[name] = symbol

    def size(self, written: Any) -> int | torch.SymInt:
        """The size of a dimension that was written."""
        return written if isinstance(written, int) else self.symbolic(written)

    def symbolic(self, written: Any) -> torch.SymInt:
        """The symbolic size that was written; a symbol that was bound to a number stays symbolic."""
        return symbolic_size(self._fake_mode, self._expression(written))

    def _expression(self, written: Any) -> sympy.Expr:
        if isinstance(written, int):
            return sympy.Integer(written)
        if isinstance(written, str):
            return self._symbols[written]
        function, *arguments = written
        return symbolic_function(function)(*map(self._expression, arguments))
