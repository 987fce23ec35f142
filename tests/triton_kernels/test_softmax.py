"""Softmax with scale and mask beside that of torch in float64; its Triton kernels in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.triton_kernels.softmax.op import SOFTMAX, SOFTMAX_BACKWARD
from tests.support.attention import assert_together
from tests.support.kernels import assert_near, computed_by, gradients, in_interpreter, mode

WAYS = ["reference", "triton"]


def _torch(x, mask=None, scale=1.0, causal=False) -> torch.Tensor:
    """Rows of which nothing counts give zeros."""
    scores = x * scale
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        rows, columns = x.shape[-2:]
        counts = torch.arange(columns) <= torch.arange(rows)[:, None] + columns - rows
        scores = torch.where(counts, scores, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def _check(x, mask=None, scale=1.0, causal=False, dtype=None, factor=1.0) -> None:
    """Values and gradients, also of a mask that is added."""
    is_added = mask is not None and mask.is_floating_point()
    tensors = [x, mask] if is_added else [x]

    def ours(x, own=mask):
        return SOFTMAX(x, own, scale, causal, dtype)

    def theirs(x, own=mask):
        return _torch(x, own, scale, causal)

    doubles = [each.double() for each in tensors]
    seed = torch.randn(x.shape).to(x.dtype if dtype is None else dtype)
    found = [ours(*tensors), *gradients(ours, tensors, [seed])]
    wanted = [theirs(*doubles), *gradients(theirs, doubles, [seed.double()])]
    assert found[0].dtype == seed.dtype
    assert_together(found, wanted, factor)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    kept=st.lists(st.booleans(), min_size=5, max_size=5),
    kind=st.sampled_from(["none", "bool", "added"]),
    dropped=st.integers(0, 4),
    causal=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_the_reference_is_that_of_torch(shape, kept, kind, dropped, causal) -> None:
    torch.manual_seed(0)
    causal = causal and len(shape) > 1
    if not shape[-1]:
        return
    x = 3 * torch.randn(shape, dtype=torch.float64)
    spread = [size if keeps else 1 for size, keeps in zip(shape, kept, strict=False)][min(dropped, len(shape)) :]
    mask = {"none": None, "bool": torch.rand(spread) < 0.6, "added": torch.randn(spread, dtype=torch.float64)}[kind]
    with mode("reference"):
        _check(x, mask, -0.7, causal, factor=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_is_that_of_torch(dtype) -> None:
    """Few rows of few columns, many of them, one tile; masks of all heads, of one, of columns alone; rows apart."""
    with in_interpreter():
        x = 3 * torch.randn(2, 3, 5, 9).to(dtype)
        added = (torch.randn(9).to(dtype), torch.randn(5, 1).to(dtype))
        for mask in (torch.randn(2, 1, 5, 9).to(dtype), torch.rand(3, 1, 9) < 0.6, *added):
            _check(x, mask, 0.3, factor=4)
        _check(x, None, -2.0, causal=True, factor=4)
        _check(x.transpose(0, 2)[..., 1:8], torch.rand(2, 5, 3, 1, 1)[0] < 0.5, 0.3, causal=True, factor=4)
        _check(torch.randn(2, 600).to(dtype), torch.rand(2, 600) < 0.5, factor=4)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_no_tile_holds_are_read_twice(causal) -> None:
    with in_interpreter():
        x = 3 * torch.randn(1, 2, 33000)
        _check(x, torch.rand(33000) < 0.5, 0.5, causal, factor=4)


@pytest.mark.parametrize("way", WAYS)
def test_a_narrow_softmax_of_wide_scores_and_the_other_way(way) -> None:
    """The gradient is found from what was rounded: of an element it is off by as much as that."""
    with computed_by(way):
        x = torch.randn(3, 4, 40)
        assert_near([SOFTMAX(x, None, 0.5, False, torch.bfloat16)], [_torch(x.double(), None, 0.5)])
        _check(x, torch.randn(4, 40), 0.5, dtype=torch.bfloat16, factor=2**13)
        _check(x.bfloat16(), None, 0.5, dtype=torch.float32, factor=2**13)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_not_finite(way) -> None:
    """A row of which nothing counts gives zeros, in its gradient too; others are as in torch."""
    infinity = float("inf")
    x = torch.randn(5, 6)
    x[0, 2:] = -infinity
    x[1] = -infinity
    x[2, 3] = infinity
    x[3, 3] = float("nan")
    with computed_by(way):
        y = SOFTMAX(x, None, 1.0, False, None)
        of_x = SOFTMAX_BACKWARD(torch.ones_like(y), y, 1.0, torch.float32)
    assert_near([y], [_torch(x.double())])
    assert torch.equal(y[1], torch.zeros(6)) and torch.equal(of_x[1], torch.zeros(6))
    assert of_x[2:4].isnan().all() and of_x[[0, 4]].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_no_row_and_no_column(way) -> None:
    with computed_by(way):
        for shape in ((0, 4), (3, 0), (2, 0, 4)):
            x = torch.randn(shape, requires_grad=True)
            y = SOFTMAX(x, None, 1.0, len(shape) > 2, None)
            assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_operators_are_what_they_declare() -> None:
    x, added = (torch.randn(2, 3, 4).bfloat16().requires_grad_() for _ in range(2))
    torch.library.opcheck(SOFTMAX, (x, added[:, :1], 0.5, False, torch.float32))
    torch.library.opcheck(SOFTMAX, (x.detach().transpose(0, 2), torch.rand(3, 2) < 0.5, 0.5, True, None))
    y = SOFTMAX(x, None, 0.5, True, None).detach()
    torch.library.opcheck(SOFTMAX_BACKWARD, (torch.randn_like(y), y, 0.5, torch.float32))
    x, added = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(3, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, mask: SOFTMAX(x, mask, -0.5, True, None), (x, added))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: SOFTMAX(x.int(), None, 1.0, False, None), r"x is int32 \[3, 8\]"),
        (lambda x: SOFTMAX(x[0], None, 1.0, True, None), r"x is float32 \[8\].*at least 2 dimensions"),
        (lambda x: SOFTMAX(x, x[:2], 1.0, False, None), r"mask is float32 \[2, 8\].*broadcasts to float32 \[3, 8\]"),
        (lambda x: SOFTMAX(x, x.int(), 1.0, False, None), "mask is int32"),
        (lambda x: SOFTMAX(x, x[None], 1.0, False, None), r"mask is float32 \[1, 3, 8\]"),
        (lambda x: SOFTMAX(x, None, float("nan"), False, None), "scale is nan, not finite"),
        (lambda x: SOFTMAX(x, None, 1.0, False, torch.int32), "dtype is torch.int32, not floating"),
        (lambda x: SOFTMAX_BACKWARD(x, x[:2], 1.0, torch.float32), r"y is float32 \[2, 8\]"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 8))
