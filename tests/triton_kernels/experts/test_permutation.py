"""Tokens by expert and back beside loops over tokens: by torch, in C++, and by Triton in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.triton_kernels.experts.permutation import kernel
from graphopt.triton_kernels.experts.permutation.op import (
    PERMUTE_TOKENS,
    SORT_BY_EXPERT,
    UNPERMUTE_TOKENS,
    UNPERMUTE_TOKENS_BACKWARD,
)
from tests.support.kernels import WAYS, assert_near, computed_by, gradients, in_interpreter, mode

VARIANTS = [
    ("reference", torch.float64),
    *(("triton", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(("cuda", dtype) for dtype in (torch.float32, torch.bfloat16)),
]


def _check_sorted(chosen: torch.Tensor, experts: int) -> None:
    order, places, ends = SORT_BY_EXPERT(chosen, experts)
    numbers = [n if 0 <= n < experts else experts for n in chosen.flatten().tolist()]
    wanted = sorted(range(len(numbers)), key=lambda i: numbers[i])  # Python's sort is stable
    assert order.tolist() == wanted
    assert places.shape == chosen.shape and places.flatten()[order].tolist() == list(range(len(numbers)))
    assert ends.tolist() == [sum(n <= expert for n in numbers) for expert in range(experts)]
    assert (order.dtype, places.dtype, ends.dtype) == (torch.int64, torch.int64, torch.int32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("count", "experts"), [(0, 3), (1, 1), (10, 4), (256, 2), (700, 40), (300, 256)])
def test_choices_of_one_expert_keep_their_order(way, count, experts) -> None:
    """None, some and many experts; one block of choices and several, which it fills or does not; some of no expert."""
    torch.manual_seed(0)
    with computed_by(way):
        _check_sorted(torch.randint(-1, experts + 1, (count,)), experts)
        _check_sorted(torch.zeros(count, dtype=torch.int64), experts)
        _check_sorted(torch.randint(experts, (count, 2)).t(), experts)


def test_counts_of_many_blocks_are_summed_in_several_steps(monkeypatch) -> None:
    monkeypatch.setattr(kernel, "_BLOCKS", 2)
    with in_interpreter():
        _check_sorted(torch.randint(3, (1300,)), 3)


@given(st.lists(st.integers(-2, 9), max_size=40), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_any_choices_are_sorted(numbers, experts) -> None:
    for way in ("reference", "cuda"):
        with computed_by(way):
            _check_sorted(torch.tensor(numbers, dtype=torch.int64), experts)


def _permuted(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    at = {int(place): token for token, row in enumerate(places) for place in row}
    return torch.stack([x[at[place]] for place in range(places.numel())])


def _unpermuted(rows: torch.Tensor, weights: torch.Tensor | None, places: torch.Tensor) -> torch.Tensor:
    factors = torch.ones(places.shape) if weights is None else weights
    return torch.stack(
        [
            sum(factor * rows[place] for factor, place in zip(*each, strict=True))  # type: ignore[misc]
            for each in zip(factors, places, strict=True)
        ]
    )


@pytest.mark.parametrize(("way", "dtype"), VARIANTS, ids=str)
def test_rows_go_there_and_back(way, dtype) -> None:
    """Rows of one element, of less than a tile, of several; of rows that lie apart."""
    torch.manual_seed(0)
    with computed_by(way):
        for tokens, top_k, width in ((1, 1, 1), (5, 2, 7), (3, 3, 2100), (2, 1, 4500)):
            places = torch.randperm(tokens * top_k).view(tokens, top_k)
            x, rows = torch.randn(tokens, width + 3).to(dtype)[:, :width], torch.randn(tokens * top_k, width).to(dtype)
            exact = torch.promote_types(dtype, torch.float32)
            seed = torch.randn(tokens, width).to(dtype)
            of_rows = torch.randn(tokens * top_k, width + 1).to(dtype)[:, 1:]
            assert torch.equal(PERMUTE_TOKENS(x, places), _permuted(x, places))
            found = gradients(lambda x, at=places: PERMUTE_TOKENS(x, at), [x], [of_rows])
            assert_near(found, [_unpermuted(of_rows.double(), None, places)])
            assert_near([UNPERMUTE_TOKENS(rows, None, places)], [_unpermuted(rows.double(), None, places)])
            for weights in (torch.rand(tokens, top_k).to(exact), torch.rand(tokens, top_k).to(dtype)):
                given, doubles = (rows, weights), (rows.double(), weights.double())
                assert_near([UNPERMUTE_TOKENS(*given, places)], [_unpermuted(*doubles, places)])
                found = gradients(lambda r, w, at=places: UNPERMUTE_TOKENS(r, w, at), given, [seed])
                wanted = gradients(lambda r, w, at=places: _unpermuted(r, w, at), doubles, [seed.double()])
                assert_near(found, wanted, 8)


@pytest.mark.parametrize("way", WAYS)
def test_no_token_has_no_row(way) -> None:
    places = torch.zeros(0, 2, dtype=torch.int64)
    rows, weights = torch.randn(0, 8, requires_grad=True), torch.rand(0, 2, requires_grad=True)
    with computed_by(way):
        assert PERMUTE_TOKENS(torch.randn(0, 8), places).shape == (0, 8)
        y = UNPERMUTE_TOKENS(rows, weights, places)
        assert y.shape == (0, 8)
        assert [each.shape for each in torch.autograd.grad(y.sum(), (rows, weights))] == [(0, 8), (0, 2)]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_in_its_row(way) -> None:
    rows = torch.randn(4, 5)
    rows[1, 2], rows[2, 3] = float("nan"), float("inf")
    places = torch.tensor([[3, 0], [2, 1]])
    with computed_by(way):
        y = UNPERMUTE_TOKENS(rows, torch.ones(2, 2), places)
    assert y[0].isfinite().all() and y[1].isfinite().tolist() == [True, True, False, False, True]


def test_operators_are_what_they_declare() -> None:
    places = torch.tensor([[3, 0], [5, 1], [2, 4]])
    x, rows = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 6))
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(SORT_BY_EXPERT, (torch.randint(5, (3, 2)), 4))
    torch.library.opcheck(PERMUTE_TOKENS, (x, places))
    torch.library.opcheck(UNPERMUTE_TOKENS, (rows, weights, places))
    torch.library.opcheck(UNPERMUTE_TOKENS, (rows, None, places))
    plain = (x.detach(), rows.detach(), weights.detach(), places)
    torch.library.opcheck(UNPERMUTE_TOKENS_BACKWARD, plain)
    with mode("reference"):
        assert torch.autograd.gradcheck(lambda x: PERMUTE_TOKENS(x, places), (x,))
        assert torch.autograd.gradgradcheck(lambda x: PERMUTE_TOKENS(x, places), (x,))
        assert torch.autograd.gradcheck(lambda r, w: UNPERMUTE_TOKENS(r, w, places), (rows, weights))


def test_on_a_gpu_places_outside_are_not_touched() -> None:
    """Which is seen on the CPU before; there nobody waits to see it."""
    places = torch.tensor([[1, 7], [-1, 0]])
    with in_interpreter():
        y = kernel.unpermute_tokens(torch.ones(4, 3), torch.ones(2, 2), places)
        of_rows, _ = kernel.unpermute_tokens_backward(torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 2), places)
        rows = kernel.permute_tokens(torch.ones(2, 3), places)
    assert y.isnan().all() and of_rows[:2].eq(1).all() and rows[:2].eq(1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: SORT_BY_EXPERT(x, 4), r"chosen is float32 \[2, 3\].*not int32 or int64"),
        (lambda x, p: SORT_BY_EXPERT(p, 0), "experts is 0, not from 1 to 4095"),
        (lambda x, p: PERMUTE_TOKENS(x[0], p), r"x is float32 \[3\].*not \[rows, width\]"),
        (lambda x, p: PERMUTE_TOKENS(x, p.int()), r"places is int32 \[2, 1\].*not int64 \[tokens, top_k\]"),
        (lambda x, p: PERMUTE_TOKENS(x[:1], p), r"places is int64 \[2, 1\].*not \[1, top_k\]"),
        (lambda x, p: PERMUTE_TOKENS(x, p + 1), "places has numbers that are none of 2 rows"),
        (lambda x, p: UNPERMUTE_TOKENS(x[:1], None, p), "for 1 rows"),
        (lambda x, p: UNPERMUTE_TOKENS(x, x, p), r"weights is float32 \[2, 3\].*not torch.float32 or .* \[2, 1\]"),
        (lambda x, p: UNPERMUTE_TOKENS_BACKWARD(x[:1], x, x[:, :1], p), r"gradient is float32 \[1, 3\]"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3), torch.tensor([[1], [0]]))
