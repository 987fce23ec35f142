"""Cross-entropy beside that of torch in float64; its Triton kernels in the interpreter; and with a linear layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from graphopt._torch import TorchDispatchMode
from graphopt.triton_kernels.cross_entropy import kernel
from graphopt.triton_kernels.cross_entropy.linear import LINEAR_CROSS_ENTROPY
from graphopt.triton_kernels.cross_entropy.op import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, CROSS_ENTROPY_BACKWARD_
from graphopt.triton_kernels.cross_entropy.reference import Options
from tests.support.kernels import WAYS, assert_near, computed_by, gradients, in_interpreter, mode

IGNORED = -100


def _torch(logits, targets, smoothing=0.0, z_loss=0.0) -> torch.Tensor:
    """Each token's loss."""
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="none",
    )
    squares = logits.logsumexp(-1).square().masked_fill(targets == IGNORED, 0)
    return flat.view(targets.shape) + z_loss * squares


def _drawn(shape, classes, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randint(classes, shape)
    targets[torch.rand(shape) < 0.2] = IGNORED
    return (3 * torch.randn(*shape, classes)).to(dtype), targets


def _check(logits, targets, smoothing, z_loss, factor=1.0) -> None:
    def ours(logits):
        return CROSS_ENTROPY(logits, targets, IGNORED, smoothing, z_loss)[0]

    def theirs(logits):
        return _torch(logits, targets, smoothing, z_loss)

    seed = torch.randn(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    assert_near([ours(logits)], [theirs(logits.double())], factor)
    assert_near(gradients(ours, [logits], [seed]), gradients(theirs, [logits.double()], [seed.double()]), factor)


@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    classes=st.integers(2, 30),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
)
@settings(max_examples=20, deadline=None)
def test_the_reference_is_that_of_torch(shape, classes, smoothing, z_loss) -> None:
    torch.manual_seed(0)
    with mode("reference"):
        _check(*_drawn(shape, classes, torch.float64), smoothing, z_loss, 10)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16), ("cuda", torch.float32),
     ("cuda", torch.bfloat16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-3)])
def test_kernels_are_that_of_torch(way, dtype, smoothing, z_loss) -> None:
    """Few classes, one step of lanes, several; rows apart."""
    with computed_by(way):
        for shape, classes in (((2, 5), 7), ((3,), 1000), ((2,), 9001)):
            _check(*_drawn(shape, classes, dtype), smoothing, z_loss, 2)
        wide, targets = _drawn((3,), 100, dtype)
        _check(wide[:, 10:90], targets % 80, smoothing, z_loss, 2)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_takes_the_place_of_logits(way) -> None:
    logits, targets = _drawn((3,), 5000)
    gradient = torch.randn(3)
    with computed_by(way):
        _, lse = CROSS_ENTROPY(logits, targets, IGNORED, 0.1, 1e-3)
        wanted = CROSS_ENTROPY_BACKWARD(logits, gradient, targets, lse, IGNORED, 0.1, 1e-3)
        CROSS_ENTROPY_BACKWARD_(logits, gradient, targets, lse, IGNORED, 0.1, 1e-3)
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize("way", WAYS)
def test_logits_that_are_not_finite_are_as_in_torch(way) -> None:
    infinity = float("inf")
    logits = torch.randn(5, 40)
    logits[0, 3:] = -infinity
    logits[1] = -infinity
    logits[2, 5] = infinity
    logits[3, 5] = float("nan")
    targets = torch.tensor([1, 2, 3, 4, IGNORED])
    with computed_by(way):
        loss, lse = CROSS_ENTROPY(logits, targets, IGNORED, 0.0, 0.0)
        of_logits = CROSS_ENTROPY_BACKWARD(logits, torch.ones(5), targets, lse, IGNORED, 0.0, 0.0)
    assert_near([loss], [_torch(logits.double(), targets)])
    (wanted,) = gradients(lambda x: _torch(x, targets), [logits], [torch.ones(5)])
    assert_near([of_logits[[0, 4]]], [wanted[[0, 4]]])
    assert of_logits[1:4].isnan().any(1).all()


def test_a_target_that_is_no_class_is_an_error_or_no_number() -> None:
    """An error where it can be seen without waiting for a device."""
    logits, targets = torch.randn(2, 8), torch.tensor([3, 8])
    with pytest.raises(ValueError, match="targets have 8, which is neither a class, from 0 to 7, nor ignore_index"):
        CROSS_ENTROPY(logits, targets, IGNORED, 0.0, 0.0)
    with in_interpreter():
        loss, lse = kernel.cross_entropy(logits, targets, Options(IGNORED, 0.0, 0.0))
        of_logits = kernel.cross_entropy_backward(logits, torch.ones(2), targets, lse, Options(IGNORED, 0.0, 0.0))
    assert loss.isnan().tolist() == [False, True]
    assert of_logits.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("way", WAYS)
def test_no_token_gives_no_loss(way) -> None:
    logits, targets = torch.randn(0, 8, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    with computed_by(way):
        loss, _ = CROSS_ENTROPY(logits, targets, IGNORED, 0.0, 0.0)
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 8)


def test_operators_are_what_they_declare() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        logits, targets = _drawn((2, 3), 6, dtype)
        gradient, lse = torch.randn(2, 2, 3, dtype=torch.promote_types(dtype, torch.float32))
        options = (IGNORED, 0.1, 1e-3)
        torch.library.opcheck(CROSS_ENTROPY, (logits.clone().requires_grad_(), targets, *options))
        torch.library.opcheck(CROSS_ENTROPY_BACKWARD, (logits, gradient, targets, lse, *options))
        torch.library.opcheck(CROSS_ENTROPY_BACKWARD_, (logits, gradient, targets, lse, *options))
    logits, targets = _drawn((4,), 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: CROSS_ENTROPY(x, targets, IGNORED, 0.1, 1e-3)[0], (logits.requires_grad_(),)
    )


def _linear(hidden, weight, targets, scales, options=(0.0, 0.0)) -> torch.Tensor:
    return LINEAR_CROSS_ENTROPY(hidden, weight, targets, scales, IGNORED, *options, True, True)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_linear_layer_before_it_gives_what_both_give(dtype) -> None:
    """In three chunks, the last of which is not full."""
    hidden, weight = torch.randn(2500, 4).to(dtype), torch.randn(10, 4).to(dtype)
    targets = _drawn((2500,), 10)[1]
    exact = torch.promote_types(dtype, torch.float32)
    scales = torch.full((2500,), 1 / int((targets != IGNORED).sum()), dtype=exact)

    def theirs(hidden, weight):
        return (_torch(hidden @ weight.t(), targets, 0.1, 1e-3) * scales).sum()

    doubles = [hidden.double(), weight.double()]
    seed = torch.tensor(0.5, dtype=exact)
    with mode("reference"):

        def ours(hidden, weight):
            return _linear(hidden, weight, targets, scales, (0.1, 1e-3))

        found = [ours(hidden, weight), *gradients(ours, [hidden, weight], [seed])]
    wanted = [theirs(*doubles), *gradients(theirs, doubles, [seed.double()])]
    loosely = {torch.float64: 100, torch.float32: 10, torch.bfloat16: 4}[dtype]
    assert abs(float(found[0] - wanted[0])) <= (0.01 if dtype is torch.bfloat16 else 1e-5) * float(wanted[0])
    assert_near(found[1:], wanted[1:], loosely)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_logits_of_all_tokens_are_never_held() -> None:
    tokens, width, classes = 8192, 4, 64
    hidden, weight = torch.randn(tokens, width), torch.randn(classes, width)
    with mode("reference"), _Largest() as largest:
        _linear(hidden, weight, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens))
    assert largest.elements <= max(1024 * classes, tokens * width)


def test_the_linear_operator_is_what_it_declares() -> None:
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    targets, scales = torch.randint(7, (5,)), torch.rand(5, dtype=torch.float64)
    torch.library.opcheck(LINEAR_CROSS_ENTROPY, (hidden, weight, targets, scales, IGNORED, 0.1, 1e-3, True, True))
    plain = (hidden.detach(), weight.detach(), targets, scales, IGNORED, 0.0, 0.0)
    torch.library.opcheck(LINEAR_CROSS_ENTROPY, (*plain, False, False))
    torch.library.opcheck(LINEAR_CROSS_ENTROPY, (*plain, True, False))
    assert torch.autograd.gradcheck(lambda h, w: _linear(h, w, targets, scales, (0.1, 1e-3)), (hidden, weight))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: CROSS_ENTROPY(x, t.int(), IGNORED, 0.0, 0.0), r"targets are int32 \[3\].*not int64 \[3\]"),
        (lambda x, t: CROSS_ENTROPY(x, t[:2], IGNORED, 0.0, 0.0), r"targets are int64 \[2\]"),
        (lambda x, t: CROSS_ENTROPY(x[:, :0], t, IGNORED, 0.0, 0.0), "of no class"),
        (lambda x, t: CROSS_ENTROPY(x, t, IGNORED, 1.5, 0.0), "label_smoothing is 1.5, not from 0 to 1"),
        (lambda x, t: CROSS_ENTROPY_BACKWARD(x, x[0], t, x[0], IGNORED, 0.0, 0.0), r"gradient is float32 \[8\]"),
        (lambda x, t: CROSS_ENTROPY_BACKWARD_(x[:, :4], x[:, 0], t, x[:, 0], IGNORED, 0.0, 0.0), "logits.* have gaps"),
        (lambda x, t: _linear(x, x[:, :3], t, x[:, 0]), r"weight is float32 \[3, 3\].*does not fit hidden"),
        (lambda x, t: _linear(x, x, t, t), r"scales is int64 \[3\].*not torch.float32 \[3\]"),
        (lambda x, t: _linear(x[0], x, t, t), r"hidden is float32 \[8\].*not \[tokens, width\]"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 8), torch.tensor([0, 1, 2]))
