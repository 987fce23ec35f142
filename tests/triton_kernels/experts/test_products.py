"""Products of groups of rows beside a loop over the groups, with their gradients, in each way they are computed."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt._torch import TorchDispatchMode
from graphopt.triton_kernels.experts.products import kernel, torchs
from graphopt.triton_kernels.experts.products.op import FAMILY, GROUPED_MM, GROUPED_OUTER
from tests.support.kernels import WAYS, assert_near, computed_by, gradients, in_interpreter, mode

VARIANTS = [  # the last: whether matrices lie turned
    *(("reference", torch.float32, turned) for turned in (False, True)),
    *(("cuda", dtype, turned) for dtype in (torch.float32, torch.bfloat16) for turned in (False, True)),
    ("triton", torch.float32, False),
    ("triton", torch.float16, False),
    ("triton", torch.bfloat16, True),
]
# Sizes of groups, rows past them, widths: aligned or not, of several tiles, of many rows a group, of one group.
SHAPES = [
    ((3, 0, 4), 2, 16, 8),
    ((0, 5, 0), 0, 13, 5),
    ((1, 2), 3, 130, 140),
    ((40, 0, 90, 75), 0, 24, 16),
    ((0, 0), 4, 8, 8),
    ((7,), 0, 8, 3),
]


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


@pytest.mark.parametrize(("way", "dtype", "turned"), VARIANTS, ids=str)
def test_kernels_are_that_of_a_loop(way: str, dtype: torch.dtype, turned: bool) -> None:
    torch.manual_seed(0)
    for sizes, past, k, n in SHAPES:
        ends, t = _ends(*sizes), sum(sizes) + past
        rows = torch.randn(t, k + 3).to(dtype)[:, :k]
        matrices = torch.randn(len(sizes), n, k).to(dtype).mT if turned else torch.randn(len(sizes), k, n).to(dtype)
        seed = torch.randn(t, n).to(dtype)
        doubles = (rows.double(), matrices.double())
        with computed_by(way):
            assert_near([GROUPED_MM(rows, matrices, ends)], [_product(*doubles, ends)], 4)
            found = gradients(lambda r, m, at=ends: GROUPED_MM(r, m, at), [rows, matrices], [seed])
        assert found[1].stride() == matrices.stride(), "the gradient lies as the matrices do"
        wanted = gradients(lambda r, m, at=ends: _product(r, m, at), doubles, [seed.double()])
        assert_near(found, wanted, 4)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_in_its_row_and_its_matrix(way: str) -> None:
    rows, matrices = torch.ones(6, 8), torch.ones(3, 8, 8)
    rows[1, 0], rows[5, 0], matrices[2, 0, 0] = float("nan"), float("nan"), float("inf")
    with computed_by(way):
        result = GROUPED_MM(rows, matrices, _ends(1, 2, 2))
        sums = GROUPED_OUTER(rows, torch.ones(6, 8), _ends(1, 2, 2))
    assert result.isfinite().all(1).tolist() == [True, False, True, False, False, True]
    assert sums.isfinite().flatten(1).all(1).tolist() == [True, False, True]


def test_where_the_product_is_that_of_torch_rows_past_the_last_end_are_zeros_too(monkeypatch) -> None:
    monkeypatch.setattr(torchs, "is_fast", lambda rows: True)
    rows, matrices, ends = torch.randn(9, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16(), _ends(3, 0, 4)
    with in_interpreter():
        found = [kernel.grouped_mm(rows, matrices, ends), kernel.grouped_outer(rows, rows, ends)]
    with mode("reference"):
        wanted = [GROUPED_MM(rows, matrices, ends), GROUPED_OUTER(rows, rows, ends)]
    assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))


def test_what_is_chosen_says_where_it_is_that_of_torch(monkeypatch) -> None:
    class OnGpu:
        is_cuda, is_cpu, device, dtype, shape = True, False, torch.device("cuda:0"), torch.bfloat16, (4, 8)

        def dim(self) -> int:
            return 2

    said = {}
    for capability in ((8, 0), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, given=capability: given)
        with mode("auto"):
            variant, said[capability] = FAMILY.choose(OnGpu())  # type: ignore[arg-type]
        assert variant == "triton"
    assert ["torch's own kernel" in why for why in said.values()] == [False, True, False]


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, m, e: GROUPED_MM(r[0], m, e), r"rows is float32 \[3\].*not \[rows, width\]"),
        (lambda r, m, e: GROUPED_MM(r, m.mT, e), r"matrices is float32 \[2, 5, 3\].*not .* \[groups, 3, n\]"),
        (lambda r, m, e: GROUPED_MM(r, m.double(), e), "matrices is float64"),
        (lambda r, m, e: GROUPED_MM(r, m, e.long()), r"ends is int64 \[2\].*not int32 \[groups\]"),
        (lambda r, m, e: GROUPED_MM(r, m, e[:1]), r"ends is int32 \[1\].*for 2 matrices"),
        (lambda r, m, e: GROUPED_MM(r, m, e.flip(0)), r"ends decrease, or do not lie within 4 rows: \[4, 1\]"),
        (lambda r, m, e: GROUPED_MM(r, m, e + 1), r"ends decrease, or do not lie within 4 rows: \[2, 5\]"),
        (lambda r, m, e: GROUPED_OUTER(r, r[:2], e), r"others is float32 \[2, 3\].*not torch.float32 \[4, n\]"),
        (lambda r, m, e: GROUPED_OUTER(r, r, e[:0]), r"ends is int32 \[0\].*not of 1 to 4095 groups"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3), torch.randn(2, 3, 5), _ends(1, 3))
