"""Experts in C++ beside torch's operators in float64; without a compiler those of torch run."""

import pytest
import torch

from graphopt.cuda_ext import experts
from graphopt.triton_kernels.experts.permutation import native as native_permutation
from graphopt.triton_kernels.experts.permutation import reference as permutation
from graphopt.triton_kernels.experts.routing import native as native_routing
from graphopt.triton_kernels.experts.routing import reference as routing
from tests.support.kernels import assert_near

_WEIGHING = experts.Weighing("sigmoid", True, 1e-20, 2.5)
_OPTIONS = (6, _WEIGHING, 8, 4)


def _check_all(dtype: torch.dtype, tokens: int, width: int) -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(tokens, 64).to(dtype), torch.rand(64)
    weights, chosen = native_routing.route(logits, bias, *_OPTIONS)
    wanted, numbers = routing.route(logits.double(), bias.double(), *_OPTIONS)
    assert torch.equal(chosen, numbers)
    assert_near([weights], [wanted], 4)
    gradient = torch.randn_like(weights)
    found = native_routing.route_backward(logits, gradient, chosen, _WEIGHING)
    exact = routing.route_backward(logits.double(), gradient.double(), chosen, _WEIGHING)
    assert_near([found], [exact], 8)
    order, places, ends = native_permutation.sort_by_expert(chosen, 64)
    for one, other in zip((order, places, ends), permutation.sort_by_expert(chosen, 64), strict=True):
        assert torch.equal(one, other)
    x, rows = torch.randn(tokens, width).to(dtype), torch.randn(tokens * 6, width).to(dtype)
    assert torch.equal(native_permutation.permute_tokens(x, places), permutation.permute_tokens(x, places))
    doubles = (rows.double(), weights.double(), places)
    assert_near([native_permutation.unpermute_tokens(rows, weights, places)], [permutation.unpermute_tokens(*doubles)])
    both = native_permutation.unpermute_tokens_backward(x, rows, weights, places)
    assert_near(both, permutation.unpermute_tokens_backward(x.double(), *doubles), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_is_near_float64(instructions: str, dtype: torch.dtype) -> None:
    for width in (1, 70, 2050):
        _check_all(dtype, 7, width)


def test_work_is_shared_among_threads(two_threads: None) -> None:
    _check_all(torch.float32, 200, 96)


def test_without_a_compiler_torch_computes_the_same(without_compiler: None) -> None:
    assert not experts.is_built()
    _check_all(torch.float32, 5, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: experts.route(x.double(), None, *_OPTIONS), "logits is torch.float64"),
        (lambda x, p: experts.route(x, x[0, :2], *_OPTIONS), r"bias has the shape \[2\], not \[3\]"),
        (lambda x, p: experts.route_backward(x, x[:, :1].clone(), p + 3, _WEIGHING), "chosen has 4"),
        (lambda x, p: experts.sort_by_expert(p.flatten().int(), 4), "chosen is torch.int32, not torch.int64"),
        (lambda x, p: experts.permute_tokens(x.t(), p), "x is not contiguous"),
        (lambda x, p: experts.permute_tokens(x, p - 1), "places has -1, which is not from 0 to 1"),
        (lambda x, p: experts.unpermute_tokens(x, x, p), r"weights has the shape \[2, 3\], not \[2, 1\]"),
        (lambda x, p: experts.unpermute_tokens_backward(x[:1], x, x[:, :1].contiguous(), p), "gradient has the shape"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3), torch.tensor([[1], [0]]))
