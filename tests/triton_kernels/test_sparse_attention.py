"""Layouts, and attention by them beside a masked softmax in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.triton_kernels.attention import layouts
from graphopt.triton_kernels.attention.op import SparseAttention
from tests.support.attention import assert_together, masked_softmax, projections
from tests.support.kernels import gradients, in_interpreter, mode


def _picture(layout) -> list[str]:
    """The layout of one head, a line for each row."""
    assert layout.shape[0] == 1
    return ["".join("#" if read else "." for read in row) for row in layout[0].tolist()]


def test_layouts_look_as_in_their_papers() -> None:
    assert _picture(layouts.local(4, 2)) == ["##..", "###.", ".###", "..##"]
    assert _picture(layouts.local(4, 2, causal=True)) == ["#...", "##..", ".##.", "..##"]
    assert _picture(layouts.strided(6, 1, 3, causal=True)) == [
        "#.....",
        ".#....",
        "..#...",
        "#..#..",
        ".#..#.",
        "..#..#",
    ]
    assert _picture(layouts.fixed(5, 2, causal=True)) == ["#....", "##...", ".##..", ".###.", ".#.##"]
    assert _picture(layouts.fixed(4, 2)) == ["##.#", "##.#", ".###", ".###"]
    assert _picture(layouts.fixed(4, 2, read_all=True)) == ["##.#", "####", ".###", "####"]
    assert _picture(layouts.variable(5, [1, 2], shared=[0])) == ["#....", "###..", "###..", "#..##", "#..##"]
    assert _picture(layouts.variable(3, [1], shared=[2], read_all=True)) == ["#.#", ".##", "###"]
    assert _picture(layouts.longformer(4, 1, shared=[1])) == ["##..", "####", ".##.", ".#.#"]
    assert _picture(layouts.bigbird(4, 1, random=0)) == ["####", "##..", "#.#.", "#..#"]


def test_heads_take_other_summaries_in_turn() -> None:
    layout = layouts.fixed(4, 4, patterns=2, heads=3, read_all=True)
    assert layout.shape == (3, 4, 4) and layout.all()
    layout = layouts.fixed(8, 4, patterns=2, heads=3)
    assert layout[:, 7].int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]


@given(blocks=st.integers(1, 12), random=st.integers(0, 4), heads=st.integers(1, 3), causal=st.booleans())
@settings(max_examples=20, deadline=None)
def test_random_blocks_are_as_many_as_asked_where_there_are(blocks, random, heads, causal) -> None:
    random = min(random, blocks)
    layout = layouts.variable(blocks, [1], shared=[], random=random, heads=heads, causal=causal)
    within = torch.eye(blocks, dtype=torch.bool)
    counts = (layout & ~within).sum(-1)
    assert layout.shape[0] in (1, heads) and layout[:, within].all() and int(counts.max()) <= random
    assert not (causal and layout.triu(1).any())
    assert torch.equal(layout, layouts.variable(blocks, [1], shared=[], random=random, heads=heads, causal=causal))
    assert (counts >= random - 1).all() or causal


@given(
    layout=st.lists(
        st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=2), min_size=1, max_size=3
    )
)
@settings(max_examples=20, deadline=None)
def test_lists_have_the_blocks_of_each_row(layout) -> None:
    found = layouts.lists(torch.tensor(layout))
    assert found.offsets.dtype == found.blocks.dtype == torch.int32
    for offsets, rows in zip(found.offsets.tolist(), layout, strict=True):
        for begin, end, row in zip(offsets, offsets[1:], rows, strict=False):
            assert found.blocks[begin:end].tolist() == [column for column, read in enumerate(row) if read]


def _check(layout, block, causal, heads, queries, keys, dtype, factor, width=16, batch=1) -> None:
    read = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :queries, :keys]
    if causal:
        read = read & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    tensors = projections(batch, heads[0], heads[1], queries, keys, width, dtype)
    module = SparseAttention(layout, block, causal=causal)
    doubles = [x.double() for x in tensors]
    seed = torch.randn(tensors[0].shape).to(dtype)
    found = [module(*tensors), *gradients(module, tensors, [seed])]
    wanted = [masked_softmax(*doubles, read), *gradients(lambda *t: masked_softmax(*t, read), doubles, [seed.double()])]
    assert_together(found, wanted, factor)


LAYOUTS = {
    "local": layouts.local(4, 2, causal=True),
    "strided": layouts.strided(4, 1, 2),
    "fixed": layouts.fixed(4, 2, patterns=2, heads=4),
    "bigbird": layouts.bigbird(4, 1, heads=4),
    "some rows read nothing": torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]]).bool()[None],
    "nothing": torch.zeros(1, 4, 4, dtype=torch.bool),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_reads_what_a_layout_says(name, causal) -> None:
    """A part of the last block too; heads that share keys; other numbers of queries and keys."""
    with mode("reference"):
        for queries, keys in ((64, 64), (60, 60), (50, 64)):
            _check(LAYOUTS[name], 16, causal, (4, 2), queries, keys, torch.float64, 10, batch=2)


@pytest.mark.parametrize("name", ["local", "some rows read nothing", "nothing"])
def test_the_kernel_reads_what_a_layout_says(name) -> None:
    with in_interpreter():
        _check(LAYOUTS[name], 16, name == "local", (2, 1), 60, 60, torch.float32, 10)


def test_the_kernel_takes_a_layout_for_each_head() -> None:
    with in_interpreter():
        _check(layouts.bigbird(3, 1, heads=4), 16, False, (4, 2), 48, 48, torch.float32, 10)


@pytest.mark.parametrize(("block", "dtype", "width"), [(16, torch.bfloat16, 64), (128, torch.float32, 32)], ids=str)
def test_the_kernel_takes_blocks_that_are_smaller_and_larger_than_a_tile(block, dtype, width) -> None:
    layout = layouts.longformer(3, 1, causal=True)
    with in_interpreter():
        _check(layout, block, True, (1, 1), 3 * block, 3 * block, dtype, 10, width)


def test_what_is_masked_is_not_read() -> None:
    """Not a number in a block that no row reads changes nothing."""
    q, k, v = projections(1, 1, 1, 64, 64, 16)
    layout = torch.ones(1, 4, 4, dtype=torch.bool)
    layout[:, :, 2] = False
    for way in (mode("reference"), in_interpreter()):
        with way:
            plain = SparseAttention(layout, 16)(q, k, v)
            lost = [x.clone() for x in (k, v)]
            for x in lost:
                x[:, :, 32:48] = math.nan
            assert torch.equal(SparseAttention(layout, 16)(q, *lost), plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layouts.local(0, 1), "blocks is 0, not at least 1"),
        (lambda: layouts.local(3, 0), "window is 0"),
        (lambda: layouts.strided(3, 1, 0), "stride is 0"),
        (lambda: layouts.fixed(8, 4, summaries=3, patterns=2), "summaries is 3, but 2 patterns.*than window, 4"),
        (lambda: layouts.variable(8, []), "windows is empty"),
        (lambda: layouts.variable(8, [2, 0]), "windows is 0"),
        (lambda: layouts.longformer(8, 1, shared=[8]), "shared has 8, which is no block, from 0 to 7"),
        (lambda: layouts.bigbird(4, 1, random=5), "random is 5, not from 0 to 4"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
