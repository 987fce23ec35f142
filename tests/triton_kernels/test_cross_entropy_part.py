"""Cross-entropy from parts of the classes, put together beside that of torch on all of them in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from graphopt.triton_kernels.cross_entropy import linear
from graphopt.triton_kernels.cross_entropy.part import (
    CROSS_ENTROPY_PART,
    CROSS_ENTROPY_PART_BACKWARD,
    ELSEWHERE,
    LINEAR_CROSS_ENTROPY_PART,
    LINEAR_CROSS_ENTROPY_PART_BACKWARD,
)
from tests.support.kernels import WAYS, assert_near, computed_by, gradients, mode


def _joined(parts, targets, smoothing):
    """Each token's loss. parts: for each (first class, number of classes, what follows from it, given its targets)."""
    found = []
    for first, classes, part in parts:
        own = targets - first
        found.append(part(own.where((own >= 0) & (own < classes), ELSEWHERE)))
    largest, powers, chosen, totals = (torch.stack(each) for each in zip(*found, strict=True))
    highest = largest.amax(0).detach()
    lse = highest + (powers * (largest - highest).exp()).sum(0).log()
    mean = totals.sum(0) / sum(classes for _, classes, _ in parts)
    return (1 - smoothing) * (lse - chosen.sum(0)) + smoothing * (lse - mean)


def _of_logits(logits, targets, cuts, smoothing):
    ends = [0, *cuts, logits.shape[-1]]
    parts = [
        (first, end - first, lambda own, part=logits[..., first:end]: CROSS_ENTROPY_PART(part, own, True))
        for first, end in itertools.pairwise(ends)
    ]
    return _joined(parts, targets, smoothing)


def _torch(logits, targets, smoothing):
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=smoothing, reduction="none")
    return flat.view(targets.shape)


def _check(logits, targets, cuts, smoothing, factor) -> None:
    def ours(logits):
        return _of_logits(logits, targets, cuts, smoothing)

    def theirs(logits):
        return _torch(logits, targets, smoothing)

    found = ours(logits)
    seed = torch.randn_like(found)
    assert_near([found], [theirs(logits.double())], factor)
    assert_near(gradients(ours, [logits], [seed]), gradients(theirs, [logits.double()], [seed.double()]), factor)


@given(st.integers(0, 3), st.integers(2, 30), st.data())
@settings(max_examples=20, deadline=None)
def test_the_reference_is_that_of_torch(tokens, classes, data) -> None:
    torch.manual_seed(0)
    cuts = sorted(data.draw(st.sets(st.integers(1, classes - 1), max_size=3)))
    logits, targets = 5 * torch.randn(tokens, classes, dtype=torch.float64), torch.randint(classes, (tokens,))
    with mode("reference"):
        _check(logits, targets, cuts, data.draw(st.sampled_from([0.0, 0.1, 1.0])), 10)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("cuda", torch.float32), ("cuda", torch.bfloat16)],
    ids=str,
)
def test_kernels_are_that_of_torch(way, dtype) -> None:
    """Few classes, one step of lanes, several; parts far apart."""
    torch.manual_seed(0)
    with computed_by(way):
        for shape, classes, cuts in (((2, 3), 7, [3]), ((3,), 1000, [1, 500]), ((2,), 9001, [4500])):
            logits = 3 * torch.randn(*shape, classes)
            logits[..., : cuts[0]] -= 50
            _check(logits.to(dtype), torch.randint(classes, shape), cuts, 0.1, 4)


@pytest.mark.parametrize("way", WAYS)
def test_a_part_that_is_all_filling_counts_nothing(way) -> None:
    """As where classes do not divide among the ranks; and the gradient there is zero."""
    logits, targets = torch.randn(3, 10), torch.tensor([0, 3, 5])
    logits[:, 6:] = -torch.inf
    with computed_by(way):
        found = CROSS_ENTROPY_PART(logits[:, 6:], torch.full((3,), ELSEWHERE), False)
        assert found[0].eq(-torch.inf).all() and not found[1].any() and not found[2].any() and not found[3].numel()
        loss = _of_logits(logits[:, :6], targets, [4], 0.0)
        ones = torch.ones(3)
        (of_filling,) = gradients(
            lambda x: CROSS_ENTROPY_PART(x, torch.full((3,), ELSEWHERE), False)[1:3], [logits[:, 6:]], [ones, ones]
        )
    assert_near([loss], [_torch(logits.double(), targets, 0.0)], 2)
    assert not of_filling.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)])
def test_with_a_linear_layer_it_is_the_loss_of_its_logits(way, asked, monkeypatch) -> None:
    """By chunks of tokens; only the gradients that are asked for."""
    monkeypatch.setattr(linear, "_LEAST_CHUNK", 3)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(7, 5), torch.randn(40, 5), torch.randint(40, (7,))

    def ours(hidden, weight):
        halves = [
            (first, 20, lambda own, part=weight[first : first + 20]: LINEAR_CROSS_ENTROPY_PART(hidden, part, own, True))
            for first in (0, 20)
        ]
        return _joined(halves, targets, 0.1)

    given = [tensor.requires_grad_(wanted) for tensor, wanted in zip((hidden, weight), asked, strict=True)]
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in given]
    with computed_by(way):
        found = ours(*given)
        found.sum().backward()
    wanted = _torch(exact[0] @ exact[1].t(), targets, 0.1)
    wanted.sum().backward()
    assert_near([found], [wanted], 4)
    assert_near(
        [each.grad for each in given if each.requires_grad], [each.grad for each in exact if each.requires_grad], 4
    )


def test_operators_are_what_they_declare() -> None:
    targets = torch.tensor([0, ELSEWHERE, 3])
    for dtype in (torch.float64, torch.bfloat16):
        logits, hidden, weight = (torch.randn(*s).to(dtype).requires_grad_() for s in ((3, 4), (3, 5), (4, 5)))
        of_token = torch.rand(3, dtype=torch.promote_types(dtype, torch.float32))
        linear_part = (hidden.detach(), weight.detach(), targets)
        for operator, arguments in (
            (CROSS_ENTROPY_PART, (logits, targets, True)),
            (CROSS_ENTROPY_PART, (logits, targets, False)),
            (CROSS_ENTROPY_PART_BACKWARD, (logits.detach(), targets, of_token, of_token, of_token, None)),
            (LINEAR_CROSS_ENTROPY_PART, (hidden, weight, targets, True)),
            (LINEAR_CROSS_ENTROPY_PART_BACKWARD, (*linear_part, *[of_token] * 4, True, False)),
        ):
            torch.library.opcheck(operator, arguments)


def test_gradients_are_those_of_differences() -> None:
    """Of all that a part gives but the largest logit, which is a constant."""
    targets = torch.tensor([0, ELSEWHERE])
    hidden, weight = (torch.randn(2, 3, dtype=torch.float64).requires_grad_() for _ in range(2))

    def summed(function, *tensors):
        found = function(*tensors, targets, True)
        highest = found[0].detach()
        return (found[1].log() + highest).sum() + found[2].sum() + found[3].sum()

    logits = torch.randn(2, 4, dtype=torch.float64)
    for function, tensors in ((CROSS_ENTROPY_PART, [logits]), (LINEAR_CROSS_ENTROPY_PART, [hidden, weight])):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        found = torch.autograd.grad(summed(function, *leaves), leaves)
        for leaf, gradient in zip(leaves, found, strict=True):
            for index in itertools.product(*map(range, leaf.shape)):
                step = torch.zeros_like(leaf)
                step[index] = 1e-6
                ends = [
                    float(summed(function, *(each + sign * step if each is leaf else each for each in leaves)))
                    for sign in (1, -1)
                ]
                assert abs((ends[0] - ends[1]) / 2e-6 - float(gradient[index])) < 1e-7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: CROSS_ENTROPY_PART(x, t + 9, True), r"targets have 9, .* nor what is elsewhere, -1"),
        (lambda x, t: CROSS_ENTROPY_PART(x[:, :0], t, True), r"cross_entropy_part: logits are .* of no class"),
        (lambda x, t: CROSS_ENTROPY_PART_BACKWARD(x, t, x[:, 0], x[:, 0], x, None), r"backward: of_chosen is float32"),
        (lambda x, t: LINEAR_CROSS_ENTROPY_PART(x, x[:, :2], t, True), r"linear_cross_entropy_part: weight is float32"),
        (lambda x, t: LINEAR_CROSS_ENTROPY_PART(x, x, t[:1], True), r"targets are int64 \[1\]"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 8), torch.zeros(3, dtype=torch.int64))
