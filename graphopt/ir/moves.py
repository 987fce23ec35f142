"""Moves of a value between the forms in which it may lie over the ranks of a mesh axis, with their adjoints.

A form says what a rank holds of a value, and of its gradient:

    R                       the whole,      and the whole gradient
    V                       the whole,      and a summand of the gradient
    P                       a summand,      and the whole gradient
    S(dim, blocks, chunk)   its own part,   and that part of the gradient

Dimension `dim` is cut into `blocks` equal blocks; of each, rank r holds `chunk` rows from row r * chunk on, zeros where
the block ends sooner. Several blocks: packed dimensions, such as queries, keys and values of one projection.

    enter        R -> V    itself                            backward: summed
    leave        P -> R    summed                            backward: itself
    part         R -> S    the own part                      backward: gathered
      varying    V -> S    the own part                      backward: the own part among zeros
    gather       S -> R    gathered                          backward: the own part
      varying    S -> V    gathered                          backward: summed, the own part
    scatter_sum  P -> S    summed, the own part              backward: gathered
    all_to_all   S -> S'   of one dimension to another       backward: the other way
    first        R -> P    on rank 0 itself, zeros elsewhere backward: itself
    maximum      V -> V    the largest of all ranks          no gradient

They are nodes of forward programs. Step programs hold what they consist of: functional collectives, ATen and, where the
rank decides, OWN_PART, PLACED and ON_FIRST. The axis is a mesh axis name, bound to a process group when the program is
emitted. extent: rows of a whole block.
"""

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.ir.dispatch import COMBINE, DISPATCH

functional = torch.ops._c10d_functional
Size = int | torch.SymInt

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("own_part(Tensor x, int dim, int blocks, SymInt chunk, int ranks, str axis) -> Tensor")
_library.define("placed(Tensor x, int dim, int blocks, SymInt extent, int ranks, str axis) -> Tensor")
_library.define("on_first(Tensor x, str axis) -> Tensor")
_library.define("enter(Tensor x, str axis) -> Tensor")
_library.define("leave(Tensor x, str axis) -> Tensor")
_library.define("part(Tensor x, int dim, int blocks, SymInt chunk, int ranks, str axis, bool varying) -> Tensor")
_library.define("gather(Tensor x, int dim, int blocks, SymInt extent, int ranks, str axis, bool varying) -> Tensor")
_library.define("scatter_sum(Tensor x, int dim, int blocks, SymInt chunk, int ranks, str axis) -> Tensor")
_library.define("all_to_all(Tensor x, int split_dim, int gather_dim, int ranks, str axis) -> Tensor")
_library.define("first(Tensor x, str axis) -> Tensor")
_library.define("maximum(Tensor x, str axis) -> Tensor")

# Of the rank's own, without communication (graphopt.runtime.parts).
OWN_PART = torch.ops.graphopt.own_part.default
PLACED = torch.ops.graphopt.placed.default
ON_FIRST = torch.ops.graphopt.on_first.default
OF_RANK: frozenset[object] = frozenset({OWN_PART, PLACED, ON_FIRST})

ENTER = torch.ops.graphopt.enter.default
LEAVE = torch.ops.graphopt.leave.default
PART = torch.ops.graphopt.part.default
GATHER = torch.ops.graphopt.gather.default
SCATTER_SUM = torch.ops.graphopt.scatter_sum.default
ALL_TO_ALL = torch.ops.graphopt.all_to_all.default
FIRST = torch.ops.graphopt.first.default
MAXIMUM = torch.ops.graphopt.maximum.default
MOVES: frozenset[object] = frozenset(
    {ENTER, LEAVE, PART, GATHER, SCATTER_SUM, ALL_TO_ALL, FIRST, MAXIMUM, DISPATCH, COMBINE}
)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: str) -> torch.Tensor:
        ctx.axis = axis
        return torch.ops.aten.alias.default(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _reduced(gradient, "sum", ctx.axis), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: str) -> torch.Tensor:
        return _reduced(x, "sum", axis)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, blocks: int, chunk: Size, ranks: int, axis: str, varying: bool
    ) -> torch.Tensor:
        ctx.whole = (dim, blocks, _block(x, dim, blocks), ranks, axis)
        ctx.varying = varying
        return OWN_PART(x, dim, blocks, chunk, ranks, axis)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return (PLACED if ctx.varying else _gathered)(gradient, *ctx.whole), None, None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, blocks: int, extent: Size, ranks: int, axis: str, varying: bool
    ) -> torch.Tensor:
        ctx.part = (dim, blocks, _block(x, dim, blocks), ranks, axis)
        ctx.varying = varying
        return _gathered(x, dim, blocks, extent, ranks, axis)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return (_scattered if ctx.varying else OWN_PART)(gradient, *ctx.part), None, None, None, None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, blocks: int, chunk: Size, ranks: int, axis: str) -> torch.Tensor:
        ctx.whole = (dim, blocks, _block(x, dim, blocks), ranks, axis)
        return _scattered(x, dim, blocks, chunk, ranks, axis)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _gathered(gradient, *ctx.whole), None, None, None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split_dim: int, gather_dim: int, ranks: int, axis: str) -> torch.Tensor:
        ctx.back = (gather_dim, split_dim, ranks, axis)
        return _exchanged(x, split_dim, gather_dim, ranks, axis)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _exchanged(gradient, *ctx.back), None, None, None, None


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: str) -> torch.Tensor:
        return ON_FIRST(x, axis)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


def _reduced(x: torch.Tensor, reduction: str, axis: str) -> torch.Tensor:
    reduced: torch.Tensor = functional.wait_tensor(functional.all_reduce(x.contiguous(), reduction, axis))
    return reduced


def _gathered(x: torch.Tensor, dim: int, blocks: int, extent: Size, ranks: int, axis: str) -> torch.Tensor:
    """The whole of the ranks' parts: copied once unless ranks are its first dimension, again where padding is cut."""
    gathered = functional.wait_tensor(functional.all_gather_into_tensor(x.contiguous(), ranks, axis))
    if dim == 0 and blocks == 1:
        return _cut(gathered, 0, extent)
    by_rank = gathered.unflatten(0, (ranks, x.shape[0])).unflatten(dim + 1, (blocks, _block(x, dim, blocks)))
    rows = _merged(by_rank.movedim(0, dim + 1), dim + 1)
    return _merged(_cut(rows, dim + 1, extent), dim)


def _scattered(x: torch.Tensor, dim: int, blocks: int, chunk: Size, ranks: int, axis: str) -> torch.Tensor:
    """This rank's part of the sum; copied as often as `_gathered`."""
    rows = _padded(x.unflatten(dim, (blocks, _block(x, dim, blocks))), dim + 1, ranks * chunk)
    by_rank = rows.unflatten(dim + 1, (ranks, chunk))
    packed = _merged(_merged(by_rank.movedim(dim + 1, 0), dim + 1), 0)
    part: torch.Tensor = functional.wait_tensor(functional.reduce_scatter_tensor(packed, "sum", ranks, axis))
    return part


def _exchanged(x: torch.Tensor, split_dim: int, gather_dim: int, ranks: int, axis: str) -> torch.Tensor:
    by_rank = x.unflatten(split_dim, (ranks, _block(x, split_dim, ranks))).movedim(split_dim, 0).contiguous()
    each = [1] * ranks
    received = functional.wait_tensor(functional.all_to_all_single(by_rank, each, each, axis))
    return _merged(received.movedim(0, gather_dim), gather_dim)


def _maximum(x: torch.Tensor, axis: str) -> torch.Tensor:
    return _reduced(x.detach(), "max", axis)


def _block(x: torch.Tensor, dim: int, blocks: int) -> Size:
    return x.shape[dim] if blocks == 1 else x.shape[dim] // blocks


def _cut(x: torch.Tensor, dim: int, size: Size) -> torch.Tensor:
    return x if _is_known_to_be(x.shape[dim], size) else torch.ops.aten.slice.Tensor(x, dim, 0, size)


def _padded(x: torch.Tensor, dim: int, size: Size) -> torch.Tensor:
    if _is_known_to_be(x.shape[dim], size):
        return x
    return torch.cat([x, x.new_zeros(_resized(x, {dim: size - x.shape[dim]}))], dim)


def _merged(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Dimensions `dim` and `dim + 1` as one, contiguous: copied unless it is known, of all sizes, not to be needed."""
    shape = [*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :]]
    below: Size = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not (_is_known_to_be(size, 1) or _is_known_to_be(stride, below)):
            return x.clone(memory_format=torch.contiguous_format).view(shape)
        below = below * size
    return x.view(shape)


def _is_known_to_be(one: Size, other: Size) -> bool:
    """Whether two sizes are equal whatever the symbols are; asking adds no guard."""
    return statically_known_true(one == other)


def _like(x: torch.Tensor, axis: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _of_part(
    x: torch.Tensor, dim: int, blocks: int, chunk: Size, ranks: int, axis: str, varying: bool = False
) -> torch.Tensor:
    return x.new_empty(_resized(x, {dim: blocks * chunk}))


def _of_exchange(x: torch.Tensor, split_dim: int, gather_dim: int, ranks: int, axis: str) -> torch.Tensor:
    return x.new_empty(_resized(x, {split_dim: x.shape[split_dim] // ranks, gather_dim: x.shape[gather_dim] * ranks}))


def _resized(x: torch.Tensor, sizes: dict[int, Size]) -> list[Size]:
    return [sizes.get(dim, size) for dim, size in enumerate(x.shape)]


for _name, _autograd, _fake in (
    ("enter", _Enter.apply, _like),
    ("leave", _Leave.apply, _like),
    ("part", _Part.apply, _of_part),
    ("gather", _Gather.apply, _of_part),
    ("scatter_sum", _ScatterSum.apply, _of_part),
    ("all_to_all", _AllToAll.apply, _of_exchange),
    ("first", _First.apply, _like),
    ("maximum", _maximum, _like),
):
    _library.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
for _name, _fake in (("own_part", _of_part), ("placed", _of_part), ("on_first", _like)):
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
