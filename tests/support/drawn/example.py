"""A drawn module with its call and plan, as data and as the Python source that is run."""

import re
from dataclasses import dataclass

from graphopt.plan import Plan
from tests.support.drawn.snippets import ENDINGS, LAYERS, Snippet

_ATTRIBUTE = re.compile(r"^self\.(\w+) = ", re.MULTILINE)


@dataclass(frozen=True)
class Layer:
    """One layer of a block.

    tied: shares its parameters with the first layer of the same kind and size; again: that first layer is called in
    its place.
    """

    kind: str
    size: int = 1
    repeat: int = 1
    frozen: bool = False
    tied: bool = False
    again: bool = False

    @property
    def snippet(self) -> Snippet:
        return LAYERS[self.kind]


@dataclass(frozen=True)
class Example:
    """A module of equal blocks, the rows of its batch on each rank, and a plan for it.

    shared: what blocks have in common: ``"nothing"``, their ``"weights"``, or ``"everything"`` (they are one block).
    leaf: the batch wants a gradient. more_rows: how many rows later batches have more.
    """

    width: int
    layers: tuple[Layer, ...]
    depth: int
    shared: str
    ending: str
    rows: int
    leaf: bool
    ranks: int
    plan: Plan
    more_rows: int = 0

    @property
    def is_random(self) -> bool:
        return any(layer.snippet.random for layer in self.layers)

    @property
    def is_coarse(self) -> bool:
        return any(layer.snippet.coarse for layer in self.layers)

    @property
    def has_repeated_layers(self) -> bool:
        """Whether blocks stand beside each other that hold modules of their own: rematerialization refuses others."""
        is_composite = any("self.l{n} = " in layer.snippet.init for layer in self.layers)
        return self.depth > 1 and self.shared != "everything" and is_composite

    @property
    def is_mean_of_rows(self) -> bool:
        """Whether one run on the whole batch gives what runs on its parts give on average, statistics counted out."""
        return ENDINGS[self.ending].whole and all(x.snippet.by_row and not x.snippet.random for x in self.layers)

    def source(self) -> str:
        """Python that defines ``Model``, ``batch(rank, step)``, ``PLAN`` and ``RANKS``."""
        uses_tokens = any(layer.snippet.tokens for layer in self.layers)
        return _MODULE.format(
            init=_indented(self._init(), 2),
            forward=_indented(self._forward(), 2),
            state=_indented(self._blocks(), 2),
            tokens=", t" * uses_tokens,
            typed=", t: torch.Tensor" * uses_tokens,
            width=self.width,
            ending=ENDINGS[self.ending].code,
            batch=_indented(self._batch(uses_tokens), 1),
            plan=str(self.plan),
            ranks=self.ranks,
        )

    def _first(self, index: int) -> int:
        """The first layer of the same kind and size."""
        same = (self.layers[index].kind, self.layers[index].size)
        return next(i for i, layer in enumerate(self.layers) if (layer.kind, layer.size) == same)

    def _init(self) -> list[str]:
        lines = []
        for index, layer in enumerate(self.layers):
            first = self._first(index)
            if layer.again and first < index:
                continue
            code = layer.snippet.init.format(n=index, w=self.width, s=layer.size)
            lines += code.splitlines()
            if layer.tied and first < index and layer.snippet.tie:
                lines.append(layer.snippet.tie.format(n=index, m=first, to="self", of="self"))
            if layer.frozen:
                lines += [f"self.{name}.requires_grad_(False)" for name in _ATTRIBUTE.findall(code)]
        return lines or ["pass"]

    def _forward(self) -> list[str]:
        lines = []
        for index, layer in enumerate(self.layers):
            number = self._first(index) if layer.again else index
            code = layer.snippet.forward.format(n=number, w=self.width, s=layer.size).splitlines()
            if layer.repeat > 1:
                code = [f"for _ in range({layer.repeat}):", *("    " + line for line in code)]
            lines += code
        return lines or ["pass"]

    def _blocks(self) -> list[str]:
        if self.shared == "everything":
            return [f"self.blocks = nn.ModuleList([Block()] * {self.depth})"]
        lines = [f"self.blocks = nn.ModuleList(Block() for _ in range({self.depth}))"]
        for index, layer in enumerate(self.layers if self.shared == "weights" else ()):
            if layer.snippet.tie and not (layer.again and self._first(index) < index):
                for block in range(1, self.depth):
                    places = {"to": f"self.blocks[{block}]", "of": "self.blocks[0]"}
                    lines.append(layer.snippet.tie.format(n=index, m=index, **places))
        return lines

    def _batch(self, uses_tokens: bool) -> list[str]:
        rows = f"{self.rows} + {self.more_rows} * (step > 0)" if self.more_rows else str(self.rows)
        lines = [f"x = torch.randn({rows}, {self.width})" + ".requires_grad_()" * self.leaf]
        return [*lines, f'return {{"x": x, "t": torch.randint(7, ({rows}, 3))}}' if uses_tokens else 'return {"x": x}']


def _indented(lines: list[str], depth: int) -> str:
    return "\n".join("    " * depth + line for line in lines)


_MODULE = """\
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
{init}

    def forward(self, x: torch.Tensor{typed}) -> torch.Tensor:
{forward}
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
{state}
        self.head = nn.Linear({width}, {width})

    def forward(self, x: torch.Tensor{typed}):
        given = x
        for block in self.blocks:
            x = block(x{tokens})
        x = self.head(x)
        {ending}


def batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 * step + rank)
{batch}


PLAN = {plan!r}
RANKS = {ranks}
"""
