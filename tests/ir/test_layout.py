"""Layouts hold each row once, as torch's own chunking does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.ir import ParameterLayout, Split


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 8), st.booleans())
def test_rows_are_those_of_chunk(shape: list[int], ranks: int, whole: bool) -> None:
    layout = ParameterLayout.choose("p", tuple(shape), torch.float32, "dp", ranks, whole)
    if layout.is_whole:
        assert whole or ranks == 1 or math.prod(shape) <= 1
        return
    value = torch.arange(math.prod(shape)).view(shape)
    chunks = list(value.chunk(ranks, dim=layout.dim or 0))
    for rank in range(ranks):
        start, rows = layout.local_rows(rank)
        wanted = chunks[rank] if rank < len(chunks) else value.narrow(layout.dim or 0, 0, 0)
        assert torch.equal(value.narrow(layout.dim or 0, start, rows), wanted)
    assert math.prod(layout.gathered_shape) >= value.numel()
    assert math.prod(layout.shape[: layout.dim]) == 1, "shards end to end are the parameter"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2), st.integers(0, 2), st.integers(1, 3))
def test_parts_over_several_axes_are_the_whole(shape: list[int], first: int, second: int, ranks: int) -> None:
    dims = [dim % len(shape) for dim in (first, second)]
    for dim, size in zip(dims, (2, 3), strict=True):
        shape[dim] *= size
    splits = (Split("ep", 2, dims[0]), Split("tp", 3, dims[1]))
    layout = ParameterLayout.choose("p", tuple(shape), torch.float32, "dp", ranks, False, splits)
    value = torch.arange(math.prod(shape)).view(shape)
    assert layout.whole_shape == tuple(shape)
    parts = [[layout.part(value, {"ep": ep, "tp": tp}) for tp in range(3)] for ep in range(2)]
    assert all(tuple(part.shape) == layout.shape for row in parts for part in row)
    assert torch.equal(torch.cat([torch.cat(row, dims[1]) for row in parts], dims[0]), value)
    unsplit = ParameterLayout.choose("p", tuple(shape), torch.float32, "dp", ranks, False)
    assert layout.split_over() == unsplit or layout.is_whole
    assert unsplit.split_over(*splits) == layout or unsplit.is_whole


def test_a_split_into_unequal_parts_says_what_can_be_split() -> None:
    layout = ParameterLayout.choose("w", (6, 8), torch.float32, "dp", 2, False)
    with pytest.raises(
        GraphoptError, match=r"w \[6, 8\] .* dimension 0 over the 4 ranks of tp: they divide dimension 1"
    ):
        layout.split_over(Split("tp", 4, 0))
