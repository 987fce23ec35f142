"""What `fuse` takes for one of its patterns, however it is written, and what it does not, however like it looks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphopt.ir import Program
from graphopt.passes.base import PassContext
from graphopt.passes.fuse import Fuse
from tests.support.forward import forward_program
from tests.support.kernels import mode
from tests.support.zoo import Entry

_WIDTH = 8
_Forward = Callable[["_Model", Tensor, Tensor], Tensor | tuple[Tensor, ...]]


class _Model(nn.Module):
    """A function of x [2, 3, 8], y alike, and a few parameters; dtype: of all of them."""

    def __init__(self, function: _Forward, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(_WIDTH, dtype=dtype))
        self.matrix = nn.Parameter(torch.randn(_WIDTH, _WIDTH, dtype=dtype))
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x * self.weight, y)


def _fused(function: _Forward, dtype: torch.dtype = torch.float32) -> dict[str, int | float | str]:
    """How often each operator is put in."""
    return _run(function, dtype)[1].statistics


def _calls(function: _Forward, dtype: torch.dtype = torch.float32) -> list[fx.Node]:
    """The program's calls when it is fused."""
    return _run(function, dtype)[0].compute_nodes()


def _run(function: _Forward, dtype: torch.dtype) -> tuple[Program, PassContext]:
    def batch() -> dict[str, Tensor]:
        return {"x": torch.randn(2, 3, _WIDTH, dtype=dtype), "y": torch.randn(2, 3, _WIDTH, dtype=dtype)}

    program = forward_program(Entry(lambda: _Model(function, dtype), batch))
    context = PassContext(program.placeholders[0].meta["val"].fake_mode, {"dp": 1}, {})
    Fuse().run(program, context)
    return program, context


def _inverse(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _gelu(x: Tensor, cubed: float = 0.044715) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + cubed * x**3)))


def _rounded(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * _inverse(wide)).to(x.dtype)


SAME: dict[str, tuple[_Forward, str]] = {
    "rms": (lambda m, x, y: m.weight * (x * _inverse(x)), "rms_norm"),
    "rms, turned round": (lambda m, x, y: _inverse(x) * x * m.weight, "rms_norm"),
    "rms by a quotient": (
        lambda m, x, y: x / torch.sqrt(1e-6 + (x * x).mean(2, keepdim=True)) * (1.0 + m.weight),
        "rms_norm",
    ),
    "rms by a power": (
        lambda m, x, y: x * torch.pow(x.square().mean(-1, True) + 1e-6, -0.5) * m.weight,
        "rms_norm",
    ),
    "rms without weight": (lambda m, x, y: x * _inverse(x), "rms_norm"),
    "rms of a sum": (lambda m, x, y: _of_sum(m, x, y), "add_rms_norm"),
    "layer norm of a viewed sum": (
        lambda m, x, y: F.layer_norm((x + y).view(-1, _WIDTH), [_WIDTH], m.weight, None),
        "add_layer_norm",
    ),
    "swiglu": (lambda m, x, y: y * F.silu(x), "gated"),
    "swiglu, spelled": (lambda m, x, y: y * (x * torch.sigmoid(x)), "gated"),
    "swiglu, viewed": (lambda m, x, y: F.silu(x).view(6, _WIDTH) * y.view(6, _WIDTH), "gated"),
    "geglu": (lambda m, x, y: F.gelu(x, approximate="tanh") * y, "gated"),
    "geglu, spelled": (lambda m, x, y: _gelu(x) * y, "gated"),
    "gelu, spelled": (lambda m, x, y: _gelu(x), "bias_activation"),
    "gelu, factored": (
        lambda m, x, y: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
        "bias_activation",
    ),
    "gelu by erf": (lambda m, x, y: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "bias_activation"),
    "bias and gelu": (lambda m, x, y: F.gelu(F.linear(x, m.matrix, m.weight)), "bias_activation"),
    "linear and loss": (
        lambda m, x, y: F.cross_entropy(F.linear(x, m.matrix).view(-1, _WIDTH), y.argmax(-1).view(-1)),
        "linear_cross_entropy",
    ),
}


def _of_sum(m: _Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return m.weight * (total * _inverse(total)), total


def _inverse_read_twice(m: _Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    inverse = _inverse(x)
    return m.weight * (x * inverse), inverse


def _activation_read_twice(m: _Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    activated = F.silu(x)
    return activated * y, activated


OTHER: dict[str, _Forward] = {
    "epsilon outside of the root": lambda m, x, y: (
        m.weight * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6))
    ),
    "mean over another dimension": lambda m, x, y: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "cubes": lambda m, x, y: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6),
    "root of another tensor": lambda m, x, y: x * _inverse(y),
    "inverse read twice": _inverse_read_twice,
    "activation read twice": _activation_read_twice,
    "another constant": lambda m, x, y: _gelu(x, cubed=0.0447),
    "quick gelu": lambda m, x, y: x * torch.sigmoid(1.702 * x),
    "gelu without bias": lambda m, x, y: F.gelu(F.linear(x, m.matrix)),
    "gate of one number a row": lambda m, x, y: F.silu(x[..., :1]) * y,
    "weighted classes": lambda m, x, y: F.cross_entropy(x.view(-1, _WIDTH), y.argmax(-1).view(-1), m.weight.detach()),
    "probabilities as targets": lambda m, x, y: F.cross_entropy(x.view(-1, _WIDTH), y.softmax(-1).view(-1, _WIDTH)),
}


@pytest.mark.parametrize("name", SAME)
def test_one_meaning_in_several_spellings(name: str) -> None:
    function, operator = SAME[name]
    assert _fused(function) == {operator: 1}


@pytest.mark.parametrize("name", OTHER)
def test_another_meaning_is_left_alone(name: str) -> None:
    assert _fused(OTHER[name]) == {}


def test_casts_between_are_read_through() -> None:
    assert _fused(lambda m, x, y: m.weight * _rounded(x), torch.bfloat16) == {"rms_norm": 1}
    assert _fused(lambda m, x, y: F.silu(x.float()).to(y.dtype) * y, torch.bfloat16) == {"gated": 1}


def test_the_result_may_be_cast_to_fewer_digits_but_not_to_more() -> None:
    """What is rounded on the way would not be."""

    def narrowed(m: _Model, x: Tensor, y: Tensor) -> Tensor:
        return (m.weight * (x * _inverse(x))).bfloat16()

    def widened(m: _Model, x: Tensor, y: Tensor) -> Tensor:
        return (m.weight * _rounded(x)).float()

    dtypes = [
        [node.meta["val"][0].dtype for node in _calls(function, dtype) if "rms_norm" in str(node.target)]
        for function, dtype in ((narrowed, torch.float32), (widened, torch.bfloat16))
    ]
    assert dtypes == [[torch.bfloat16], [torch.bfloat16]]


@pytest.mark.parametrize("read", ["once", "twice", "in evaluation", "on both sides"])
def test_a_dropout_that_the_sum_alone_reads_goes_along(read: str) -> None:
    def function(m: _Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        dropped = F.dropout(x, 0.5, read != "in evaluation")
        total = dropped + (dropped if read == "on both sides" else y)
        return m.weight * (total * _inverse(total)), *([dropped] if read == "twice" else [])

    names = [str(node.target) for node in _calls(function)]
    assert names.count("graphopt.add_rms_norm.default") == 1
    assert names.count("graphopt.dropout_mask.default") == (read == "once")
    assert names.count("aten.native_dropout.default") == (read in ("twice", "on both sides"))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: F.softmax(x * 0.3 + y, dim=-1, dtype=torch.float32).to(x.dtype),
        lambda m, x, y: F.softmax(y[:, :1] + x / 8, -1),
        lambda m, x, y: (0.3 * x.float()).softmax(2).to(x.dtype),
        lambda m, x, y: torch.softmax(x + m.weight, 2),
        lambda m, x, y: torch.softmax(x, -1, dtype=torch.float32),
    ],
)
def test_a_softmax_is_taken_with_what_is_around_it(function: _Forward) -> None:
    with mode("reference"):  # no variant is for the CPU by itself
        assert _fused(function, torch.bfloat16) == {"softmax": 1}
    assert _fused(function, torch.bfloat16) == {}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: F.softmax(x, dim=-1),
        lambda m, x, y: F.softmax(x * 0.3, dim=1),
        lambda m, x, y: F.log_softmax(x * 0.3, dim=-1),
    ],
)
def test_a_softmax_that_is_one_operator_already_is_left_alone(function: _Forward) -> None:
    with mode("reference"):
        assert _fused(function) == {}


def test_what_no_kernel_takes_is_left_alone() -> None:
    assert _fused(lambda m, x, y: m.weight * (x * _inverse(x)), torch.float64) == {}


def test_logits_that_are_returned_are_computed() -> None:
    def function(m: _Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, m.matrix)
        return F.cross_entropy(logits.view(-1, _WIDTH), y.argmax(-1).view(-1)), logits

    assert _fused(function) == {"cross_entropy": 1}


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _rotary(doubled: bool, same: bool) -> _Forward:
    def function(m: _Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        q, k = x.view(1, 2, 3, _WIDTH), y.view(1, 2, 3, _WIDTH)
        angle = torch.arange(12.0).view(1, 3, 4)
        angles = torch.cat((angle, angle if doubled else 2 * angle), -1)
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        others = (cos, sin) if same else (sin, cos)
        return _turned(q, cos, sin), _turned(k, *others)

    return function


def test_queries_and_keys_are_turned_together_by_angles_of_pairs() -> None:
    assert _fused(_rotary(True, True)) == {"rotary": 1}
    assert _fused(_rotary(False, True)) == {}
    assert _fused(_rotary(True, False)) == {}


@pytest.mark.parametrize(
    ("beside", "joined", "options"),
    [
        (True, torch.cat, (True, False, True)),
        (True, lambda pair, dim: torch.stack(pair, dim).flatten(-2), (True, False)),
        (False, torch.cat, (False, False)),
    ],
)
def test_pairs_may_be_turned_one_half_at_a_time(beside: bool, joined: Any, options: tuple[bool, ...]) -> None:
    """Those that lie side by side may come out half a width apart, as in DeepSeek."""

    def function(m: _Model, x: Tensor, y: Tensor, is_turn: bool = True) -> tuple[Tensor, ...]:
        angle = torch.arange(12.0).view(1, 3, 4)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        found = []
        for rows in (x.view(1, 2, 3, _WIDTH), y.view(1, 2, 3, _WIDTH)):
            a, b = (rows[..., 0::2], rows[..., 1::2]) if beside else (rows[..., :4], rows[..., 4:])
            other = b * cos + a * sin if is_turn else b * cos - a * sin
            found.append(joined((a * cos - b * sin, other), -1))
        return tuple(found)

    (call,) = (node for node in _calls(function) if "rotary" in str(node.target))
    assert call.args[4:] == options
    assert _fused(lambda m, x, y: function(m, x, y, False)) == {}
