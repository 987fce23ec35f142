"""Layouts hold each row once, as torch's own chunking does."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.ir import ParameterLayout


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
