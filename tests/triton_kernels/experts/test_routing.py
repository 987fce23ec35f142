"""Routing beside a loop over tokens in float64: by operators of torch, in C++, and by Triton in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.triton_kernels.experts.routing.op import ROUTE, ROUTE_BACKWARD
from tests.support.kernels import TOLERANCES, WAYS, assert_near, computed_by, gradients, mode

_DTYPES = {"triton": [torch.float32, torch.bfloat16, torch.float16], "cuda": [torch.float32, torch.bfloat16]}
VARIANTS = [("reference", torch.float64), *((way, dtype) for way, dtypes in _DTYPES.items() for dtype in dtypes)]
OPTIONS = {
    "mixtral": ("softmax", True, 0.0, 1.0, 1, 1),
    "as they are": ("softmax", False, 0.0, 1.0, 1, 1),
    "deepseek": ("sigmoid", True, 1e-20, 2.5, 4, 2),
    "sigmoid": ("sigmoid", False, 0.0, 0.5, 1, 1),
}


def _written_out(logits, bias, top_k, scores, normalized, epsilon, scale, groups, top_groups):
    """The weights of a token's best experts, and their numbers, token by token."""
    weights, chosen = [], []
    for row in logits.double():
        powers = row.exp()
        found = powers / powers.sum() if scores == "softmax" else powers / (1 + powers)
        keys = (found if bias is None else found + bias).tolist()
        size = len(keys) // groups
        of_group = [sorted(keys[g * size : (g + 1) * size])[-2:] for g in range(groups)]
        best = sorted(range(groups), key=lambda g: -sum(of_group[g]))[:top_groups]
        open_to = [e for e in range(len(keys)) if e // size in best]
        numbers = sorted(open_to, key=lambda e: -keys[e])[:top_k]
        picked = found[numbers]
        weights.append(scale * (picked / (picked.sum() + epsilon) if normalized else picked))
        chosen.append(numbers)
    return torch.stack(weights), torch.tensor(chosen)


def _drawn(tokens: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits that differ within a row, as sums of two scores do, so that there is one choice."""
    orders = torch.rand(tokens, experts).argsort(1)
    return (orders * 4 / experts - 1.7).to(dtype)


def _check(logits, bias, top_k, options) -> None:
    weights, chosen = ROUTE(logits, bias, top_k, *options)
    wanted, numbers = _written_out(logits, bias, top_k, *options)
    assert torch.equal(chosen, numbers)
    assert weights.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert_near([weights], [wanted], 4)
    seed = torch.randn(weights.shape, dtype=weights.dtype)
    found = gradients(lambda x: ROUTE(x, bias, top_k, *options)[0], [logits], [seed])
    exact = gradients(lambda x: _written_out(x, bias, top_k, *options)[0], [logits.double()], [seed.double()])
    if top_k == 1 and options[1]:  # the weight is one, whatever the logits
        assert found[0].abs().max() <= 8 * TOLERANCES[logits.dtype] * options[3]
    else:
        assert_near(found, exact, 8)


@pytest.mark.parametrize(("way", "dtype"), VARIANTS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_best_are_chosen_and_weighed(way, dtype, options) -> None:
    """Experts that fill their tile and that do not, tokens that fill the last one and that do not; rows apart."""
    torch.manual_seed(0)
    with computed_by(way):
        for tokens, experts, top_k in ((5, 8, 2), (3, 12, 3), (130, 8, 1), (2, 64, 6)):
            _check(_drawn(tokens, experts, dtype), None, top_k, options)
            _check(_drawn(tokens, experts, dtype), torch.rand(experts) / 16, top_k, options)
        _check(_drawn(3, 20, dtype)[:, 4:16], None, 2, options)


@given(
    tokens=st.integers(1, 6),
    groups=st.integers(1, 3),
    size=st.integers(2, 5),
    options=st.sampled_from(list(OPTIONS.values())),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_sizes(tokens, groups, size, options, data) -> None:
    torch.manual_seed(0)
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    options = (*options[:4], groups, top_groups)
    for way, dtype in (("reference", torch.float64), ("cuda", torch.float32)):
        with computed_by(way):
            _check(_drawn(tokens, groups * size, dtype), None, top_k, options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_what_is_not_finite_chooses_experts_that_there_are(way, scores) -> None:
    logits = torch.randn(4, 8)
    logits[0, 3] = float("nan")
    logits[1] = -float("inf")
    logits[2, 5] = float("inf")
    with computed_by(way):
        weights, chosen = ROUTE(logits, None, 3, scores, True, 0.0, 1.0, 1, 1)
        of_logits = ROUTE_BACKWARD(torch.ones(4, 3), logits, chosen, scores, True, 0.0, 1.0)
    assert all(len(set(row)) == 3 and set(row) <= set(range(8)) for row in chosen.tolist())
    assert weights[0].isnan().all() and of_logits[0].isnan().any()
    assert weights[3].isfinite().all() and of_logits[3].isfinite().all()
    if scores == "sigmoid":
        assert 3 in chosen[0] and 5 in chosen[2]


@pytest.mark.parametrize("way", WAYS)
def test_no_token_has_no_choice(way) -> None:
    logits = torch.randn(0, 8, requires_grad=True)
    with computed_by(way):
        weights, chosen = ROUTE(logits, None, 2, "softmax", True, 0.0, 1.0, 1, 1)
        assert weights.shape == chosen.shape == (0, 2)
        assert torch.autograd.grad(weights.sum(), logits)[0].shape == (0, 8)


def test_operators_are_what_they_declare() -> None:
    for options in OPTIONS.values():
        logits = _drawn(3, 12, torch.float64)
        bias = torch.rand(12) / 16
        torch.library.opcheck(ROUTE, (logits.clone().requires_grad_(), bias, 2, *options))
        weights, chosen = ROUTE(logits, bias, 2, *options)
        torch.library.opcheck(ROUTE_BACKWARD, (torch.randn_like(weights), logits, chosen, *options[:4]))
        with mode("reference"):
            assert torch.autograd.gradcheck(
                lambda x, b=bias, o=options: ROUTE(x, b, 2, *o)[0], (logits.requires_grad_(),)
            )


_PLAIN = ("softmax", True, 0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ROUTE(x[0], None, 2, *_PLAIN, 1, 1), r"logits is float32 \[8\].*not \[tokens, experts\]"),
        (lambda x: ROUTE(x.long(), None, 2, *_PLAIN, 1, 1), "logits is int64"),
        (lambda x: ROUTE(x, x[0, :3], 2, *_PLAIN, 1, 1), r"bias is float32 \[3\].*not float32 \[8\]"),
        (lambda x: ROUTE(x, None, 9, *_PLAIN, 1, 1), "top_k is 9, not from 1 to 8"),
        (lambda x: ROUTE(x, None, 5, *_PLAIN, 4, 2), "top_k is 5, not from 1 to 4"),
        (lambda x: ROUTE(x, None, 2, *_PLAIN, 3, 1), "groups is 3, which does not cut 8 experts"),
        (lambda x: ROUTE(x, None, 2, *_PLAIN, 8, 4), "groups is 8, which does not cut 8 experts into groups of two"),
        (lambda x: ROUTE(x, None, 2, *_PLAIN, 4, 5), "top_groups is 5, not from 1 to 4"),
        (lambda x: ROUTE(x, None, 2, "softmin", True, 0.0, 1.0, 1, 1), "'softmin': .*softmax"),
        (
            lambda x: ROUTE_BACKWARD(x[:, :2], x, torch.full((3, 2), 8), *_PLAIN),
            "chosen has numbers that are none of 8 experts",
        ),
        (lambda x: ROUTE_BACKWARD(x, x, torch.zeros(3, 2, dtype=torch.int64), *_PLAIN), r"gradient is .* \[3, 8\]"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 8))
