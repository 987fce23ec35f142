"""Products of groups of rows beside a loop over the groups, with their gradients, in each way they are computed."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt._torch import TorchDispatchMode
from graphopt.ir.grouped import GROUPED_MM, GROUPED_OUTER


def _ends(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0, dtype=torch.int32)


def _owners(ends: torch.Tensor, rows: int) -> list[int]:
    """The group of each row; as many as there are groups for rows that are of none."""
    return [int((ends <= row).sum()) for row in range(rows)]


def _product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    padded = torch.cat([matrices, torch.zeros_like(matrices[:1])])
    return torch.stack([row @ padded[owner] for row, owner in zip(rows, _owners(ends, len(rows)), strict=True)])


@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    past=st.integers(0, 2),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
@settings(max_examples=40, deadline=None)
def test_each_row_is_multiplied_with_the_matrix_of_its_group(sizes, past, widths) -> None:
    torch.manual_seed(0)
    t, (k, n), ends = sum(sizes) + past, widths, _ends(*sizes)
    if t == 0:
        assert GROUPED_MM(torch.zeros(0, k), torch.zeros(len(sizes), k, n), ends).shape == (0, n)
        return
    rows = torch.randn(t, k, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(len(sizes), k, n, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(t, n, dtype=torch.float64)
    results = [make(rows, matrices, ends) for make in (GROUPED_MM, _product)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((result * weights).sum(), (rows, matrices)) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", [GROUPED_MM, GROUPED_OUTER])
def test_operators_are_what_they_declare(target) -> None:
    rows, ends = torch.randn(9, 3, dtype=torch.float64, requires_grad=True), _ends(3, 0, 4)
    shape = (3, 3, 5) if target is GROUPED_MM else (9, 5)
    other = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(target, (rows, other, ends))
    assert torch.autograd.gradcheck(lambda a, b: target(a, b, ends), (rows, other))
    assert torch.autograd.gradgradcheck(lambda a, b: target(a, b, ends), (rows, other))


class _Calls(TorchDispatchMode):
    """The calls of the two operators inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (GROUPED_MM, GROUPED_OUTER):
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("of_rows", "of_matrices"), [(True, True), (True, False), (False, True)])
def test_no_gradient_is_computed_that_nobody_asks_for(of_rows: bool, of_matrices: bool) -> None:
    rows, matrices = torch.randn(4, 3, requires_grad=of_rows), torch.randn(2, 3, 5, requires_grad=of_matrices)
    result = GROUPED_MM(rows, matrices, _ends(1, 3))
    with _Calls() as calls:
        result.sum().backward()
    assert calls.seen == [GROUPED_MM] * of_rows + [GROUPED_OUTER] * of_matrices


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("k", "n"), [(16, 8), (16, 5), (12, 8)])
def test_bfloat16_gives_what_a_loop_does_by_the_kernel_of_torch_too(k: int, n: int, turned: bool) -> None:
    """Which takes rows of 16 bytes, and leaves what is past the last end as memory was."""
    torch.manual_seed(0)
    ends = _ends(3, 0, 4)
    rows, others = torch.randn(9, k).bfloat16(), torch.randn(9, n).bfloat16()
    matrices = torch.randn(3, n, k).bfloat16().mT if turned else torch.randn(3, k, n).bfloat16()
    wanted = torch.zeros(9, n).bfloat16()
    sums = torch.zeros(3, k, n).bfloat16()
    for index, group in enumerate((slice(0, 3), slice(3, 3), slice(3, 7))):
        wanted[group] = rows[group] @ matrices[index]
        sums[index] = rows[group].t() @ others[group]
    found = GROUPED_MM(rows, matrices, ends), GROUPED_OUTER(rows, others, ends)
    for result, expected in zip(found, (wanted, sums), strict=True):
        assert torch.equal(result, expected) and result.is_contiguous()


def test_what_the_kernel_of_torch_does_not_take_is_computed_too() -> None:
    """A gradient that a sum spreads, a row that is repeated, memory that starts anywhere, no row at all."""
    matrices, ends = torch.ones(2, 8, 16).bfloat16(), _ends(2, 2)
    spread = torch.ones(()).bfloat16().expand(4, 8)
    repeated = torch.ones(8).bfloat16().expand(4, 8)
    shifted = torch.ones(33).bfloat16()[1:].view(4, 8)
    for rows in (spread, repeated, shifted):
        assert torch.equal(GROUPED_MM(rows, matrices, ends), torch.full((4, 16), 8.0).bfloat16())
        assert torch.equal(GROUPED_OUTER(rows, rows, ends), torch.full((2, 8, 8), 2.0).bfloat16())
    assert GROUPED_MM(torch.ones(0, 8).bfloat16(), matrices, _ends(0, 0)).shape == (0, 16)
