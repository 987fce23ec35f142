"""Shapes and the factors they share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.capture.arguments import flatten_call
from graphopt.capture.export import capture
from graphopt.dimensions.factors import refined
from graphopt.dimensions.signature import Dimensions
from graphopt.dimensions.table import signature_of
from tests.dimensions.test_table import written


def _text(dimensions: Dimensions) -> str:
    return " ".join(f"({' '.join(dim)})" if len(dim) != 1 else dim[0] for dim in dimensions)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 12), (2, 3, 4), "x0 (x1 x2) -> x0 x1 x2"),
        ((2, 1, 3), (2, 3), "x0 () x1 -> x0 x1"),
        ((6,), (1, 6, 1), "x0 -> () x0 ()"),
        ((), (1,), " -> ()"),
        ((4, 6, 5), (6, 4, 5), "(x0 w1) w3 x1 -> (x0 w2) w4 x1"),
        ((0, 3), (3, 0), "w0 w1 -> w2 w3"),
    ],
)
def test_the_factors_of_two_shapes(before: tuple[int, ...], after: tuple[int, ...], expected: str) -> None:
    _, first, second = refined(before, after)
    assert f"{_text(first)} -> {_text(second)}" == expected


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_factors_multiply_to_the_sizes(factors: list[int], data: st.DataObject) -> None:
    before = tuple(data.draw(st.permutations(factors)))
    labels, first, second = refined(before, (math.prod(factors[:2]), *factors[2:]))
    for shape, dimensions in ((before, first), ((math.prod(factors[:2]), *factors[2:]), second)):
        assert [math.prod(labels.sizes[label] for label in dim) for dim in dimensions] == list(shape)
    shared = {label for dim in first for label in dim} & {label for dim in second for label in dim}
    assert shared.isdisjoint(labels.whole)


class _Views(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(x.shape[0], x.shape[1], 4, -1).transpose(1, 2)
        merged = heads.reshape(x.shape[0] * 4, x.shape[1], -1)
        flat = merged.reshape(x.shape[0], 4 * x.shape[1], -1)
        return flat.reshape(-1, flat.shape[-1]).reshape(x.shape[1], -1)


def test_symbols_are_factors_too_and_get_no_guards() -> None:
    tensors, spec = flatten_call((), {"x": torch.randn(6, 10, 32)})
    captured = capture(_Views(), tensors, spec, ["x"], dynamic=lambda name, rank: (0, 1))
    shapes = captured.fake_mode.shape_env
    assert shapes is not None
    guards = len(shapes.guards)
    found = [
        written(signature_of(node))
        for node in captured.program.graph.nodes
        if node.op == "call_function" and str(node.target) in ("aten.view.default", "aten.reshape.default")
    ]
    assert len(shapes.guards) == guards
    assert found == [
        "x0 x1 (x2 x3) -> x0 x1 x2 x3",
        "(x0 x1) x2 x3 -> x0 (x1 x2) x3",
        "x0 x1 x2 -> (x0 x1) x2",
        "(x0 x1) x2 -> x0 (x1 x2)",
    ]
