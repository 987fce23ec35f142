"""Running an operator on parts of its operands, as its signature says that it may be."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.dimensions.local import localized_arguments
from graphopt.dimensions.signature import Dimensions, Signature, operands_of
from graphopt.dimensions.table import signature_of
from graphopt.ir import Program
from tests.support.forward import distinct_calls

aten = torch.ops.aten
Tensors = list[torch.Tensor]
_UNSET = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)


def node_of(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call with tensors, which stand in `meta` of its operands, as its result does in its own."""
    graph = fx.Graph()

    def placeholder(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [placeholder(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    given = placeholder(args)
    named = {name: placeholder(value) for name, value in kwargs.items()}
    node = graph.call_function(target, tuple(given), named)
    node.meta["val"] = target(*args, **kwargs)
    return node


def check_parts(node: fx.Node, tensors: Tensors, parts: int) -> None:
    """Hold `node` to its signature: run on parts along each label that it may be split along, and joined, it gives what
    it gives on the whole."""
    signature = signature_of(node)
    assert signature is not None, f"{node.target} has no signature"
    checked = [label for label in signature.labels if label not in signature.localized]
    checked = [label for label in checked if signature.sizes[label] >= parts]
    whole = _run(node, tensors, node.args, node.kwargs)
    for label in checked:
        pieces = [_part(node, signature, tensors, label, chunk) for chunk in _chunks(signature.sizes[label], parts)]
        for index, dimensions in enumerate(signature.results):
            found = [piece[index] for piece in pieces]
            _same(_joined(found, signature, dimensions, label), whole[index], f"{node.target} along {label}")


def check_linear(node: fx.Node, tensors: Tensors) -> None:
    """Hold `node` to what its signature says it is linear in."""
    signature = signature_of(node)
    assert signature is not None
    for operands in signature.linear:
        others = [torch.randn_like(t) if index in operands else t for index, t in enumerate(tensors)]
        both = [t + o if index in operands else t for index, (t, o) in enumerate(zip(tensors, others, strict=True))]
        runs = (_run(node, given, node.args, node.kwargs) for given in (tensors, others, both))
        for one, other, together in zip(*runs, strict=True):
            _same(one + other, together, f"{node.target} in {sorted(operands)}")


def check_program(program: Program, seen: set[str]) -> None:
    """Hold every call of `program` to its signature, in two and three parts, but those in `seen`, which it adds to.

    Fails with the names of operators that have none.
    """
    calls = list(distinct_calls(program, seen))
    unknown = {str(node.target) for node in calls if signature_of(node) is None}
    assert not unknown, f"no signature is known of {', '.join(sorted(unknown))}"
    for node in calls:
        tensors = random_tensors(node)
        check_linear(node, tensors)
        for parts in (2, 3):
            check_parts(node, tensors, parts)


@dataclass(frozen=True)
class _Chunk:
    start: int
    length: int
    first: bool


def _chunks(size: int, parts: int) -> Iterator[_Chunk]:
    """Uneven where the parts do not divide the size."""
    for piece in torch.tensor_split(torch.arange(size), parts):
        yield _Chunk(int(piece[0]), len(piece), int(piece[0]) == 0)


def _part(node: fx.Node, signature: Signature, tensors: Tensors, label: str, chunk: _Chunk) -> Tensors:
    given: Tensors = []
    for index, (tensor, dimensions) in enumerate(zip(tensors, signature.operands, strict=True)):
        if any(label in dim for dim in dimensions):
            tensor = narrowed(tensor, dimensions, signature.sizes, label, chunk.start, chunk.length)
        elif signature.is_reduced(label) and index in signature.addends and not chunk.first:
            tensor = torch.zeros_like(tensor)
        given.append(tensor)
    sizes = {**signature.sizes, label: chunk.length}
    results = [shape_of(dimensions, sizes) for dimensions in signature.results]
    args, kwargs = localized_arguments(node, [tuple(tensor.shape) for tensor in given], results)
    found = _run(node, given, args, kwargs)
    assert [tuple(tensor.shape) for tensor in found] == results, f"{node.target} along {label}"
    return found


def shape_of(dimensions: Dimensions, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[label] for label in dim) for dim in dimensions)


def narrowed(
    tensor: torch.Tensor, dimensions: Dimensions, sizes: Mapping[str, int], label: str, start: int, length: int
) -> torch.Tensor:
    """The part of a tensor along a factor of one of its dimensions."""
    factors = tensor.reshape([sizes[name] for dim in dimensions for name in dim])
    at = [name for dim in dimensions for name in dim].index(label)
    return factors.narrow(at, start, length).contiguous().reshape(shape_of(dimensions, {**sizes, label: length}))


def _joined(pieces: Tensors, signature: Signature, dimensions: Dimensions, label: str) -> torch.Tensor:
    flat = [name for dim in dimensions for name in dim]
    if label not in flat:
        return torch.stack(pieces).sum(0, dtype=pieces[0].dtype)
    sizes = signature.sizes
    lengths = [chunk.length for chunk in _chunks(sizes[label], len(pieces))]
    factors = [
        piece.reshape([{**sizes, label: length}[name] for name in flat])
        for piece, length in zip(pieces, lengths, strict=True)
    ]
    return torch.cat(factors, flat.index(label)).reshape(shape_of(dimensions, sizes))


def _run(node: fx.Node, tensors: Tensors, args: Any, kwargs: Any) -> Tensors:
    """Call the operator of `node` with `tensors` in place of its operands."""
    rest = iter(tensors)

    def value(argument: fx.Node) -> Any:
        known = argument.meta["val"]
        return next(rest) if isinstance(known, torch.Tensor) else known

    args, kwargs = fx.map_arg((args, kwargs), value)
    found = node.target(*args, **kwargs)  # type: ignore[operator]
    if node.target in _UNSET:
        found.zero_()
    return [item for item in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(item, torch.Tensor)]


def _same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-5 if expected.dtype == torch.float32 else 1e-10, atol=1e-10, equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


def random_tensors(node: fx.Node) -> Tensors:
    """Values for the operands of a captured call: doubles, and indices that fit wherever they may be used, in order."""
    operands = [operand.meta["val"] for operand in operands_of(node)]
    least = min(itertools.chain(*(tensor.shape for tensor in operands)), default=1)
    return [_random(tensor, max(int(least), 1)) for tensor in operands]


def _random(like: torch.Tensor, limit: int) -> torch.Tensor:
    shape = tuple(map(int, like.shape))
    if like.is_floating_point():
        return torch.randn(shape, dtype=torch.float64)
    return torch.randint(0, 2 if like.dtype == torch.bool else limit, shape).to(like.dtype).sort().values
