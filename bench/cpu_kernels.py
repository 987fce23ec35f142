"""The kernels for the CPU beside torch, eager and compiled by Inductor, interleaved, at shapes of public models.

Ours are called as autograd would call them: forward, then backward of what it returned. Rivals run under autograd where
a case trains, and without gradients where it does not.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from bench.statistics import paired_ratios, spread
from graphopt.cuda_ext import activations, norms, quantized, reference
from graphopt.cuda_ext.cross_entropy import cross_entropy, cross_entropy_with_gradient
from graphopt.cuda_ext.rotary import rotary

Call = Callable[[], Any]
_TURN_SECONDS = 0.03  # what a turn lasts at least, so that clocks and calls of Python do not count


@dataclass(frozen=True)
class Case:
    """ours: the kernels; theirs: what of `inputs` torch computes; gradient: of its result, where the case trains."""

    kernel: str
    shape: str
    ours: Call
    theirs: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...]
    gradient: tuple[torch.Tensor, ...] | None = None

    def rivals(self) -> dict[str, Call]:
        compiled = torch.compile(self.theirs, dynamic=False)
        return {"graphopt": self.ours, "eager": self._run(self.theirs), "compile": self._run(compiled)}

    def _run(self, function: Callable[..., Any]) -> Call:
        gradient = self.gradient
        if gradient is None:
            return lambda: function(*self.inputs)
        leaves = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in self.inputs)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]

        def step() -> Any:
            found = function(*leaves)
            return torch.autograd.grad(found if isinstance(found, tuple) else (found,), wanted, gradient)

        return step


def compare(kernels: list[str], dtypes: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Seconds a call, each case's, and the geometric mean of eager's and compiled's over ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    for kernel in tqdm(kernels):
        for dtype in dtypes:
            torch.manual_seed(0)
            for case in CASES[kernel](getattr(torch, dtype)):
                found.append({"kernel": case.kernel, "shape": case.shape, "dtype": dtype, **_measured(case, rounds)})
    torch.set_num_threads(before)
    return {"cases": found, "geometric_mean": {name: _mean(found, name) for name in ("eager", "compile")}}


def _mean(found: list[dict[str, Any]], name: str) -> float:
    return math.exp(sum(math.log(each["ratios"][name]["median"]) for each in found) / len(found))


def _measured(case: Case, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()
    rivals = case.rivals()
    times: dict[str, list[list[float]]] = {name: [] for name in rivals}
    calls = {name: _calls(call) for name, call in rivals.items()}
    for _ in range(rounds):
        for name, call in rivals.items():
            times[name].append([_turn(call, calls[name])])
    return {
        "seconds": {name: asdict(spread([turn for (turn,) in each])) for name, each in times.items()},
        "ratios": {name: asdict(each) for name, each in paired_ratios(times, "graphopt").items()},
    }


def _calls(call: Call) -> int:
    """How many fill a turn; the first, which may compile, is not counted."""
    call()
    return max(1, math.ceil(_TURN_SECONDS / _turn(call, 3)))


def _turn(call: Call, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def _rms_norm(dtype: torch.dtype) -> Iterator[Case]:
    def ours(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> Any:
        _, summed, inverse = norms.rms_norm(x, weight, 1e-5, residual)
        return norms.rms_norm_backward(dy, summed, weight, inverse, dy)

    def theirs(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        summed = x + residual
        return functional.rms_norm(summed, weight.shape, weight, 1e-5), summed

    for model, rows, width in (
        ("Llama-3-8B, one token", 1, 4096),
        ("Llama-3-8B", 1024, 4096),
        ("Llama-3.2-1B", 1024, 2048),
    ):
        x, residual, dy = _random(dtype, 3, rows, width)
        weight, shape = _random(dtype, width), f"{model}: {rows} x {width}"
        inputs = (x, residual, weight)
        yield Case("RMSNorm, add", shape, lambda: norms.rms_norm(x, weight, 1e-5, residual), theirs, inputs)
        if rows > 1:
            step = lambda: ours(x, residual, weight, dy)  # noqa: E731
            yield Case("RMSNorm, add, both ways", shape, step, theirs, inputs, (dy, dy))


def _layer_norm(dtype: torch.dtype) -> Iterator[Case]:
    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor) -> Any:
        _, _, mean, inverse = norms.layer_norm(x, weight, bias, 1e-5)
        return norms.layer_norm_backward(dy, x, weight, mean, inverse)

    def theirs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    for model, rows, width in (("GPT-2", 1024, 768), ("OPT-6.7B", 1024, 4096)):
        x, dy = _random(dtype, 2, rows, width)
        weight, bias = _random(dtype, 2, width)
        inputs, shape = (x, weight, bias), f"{model}: {rows} x {width}"
        yield Case("LayerNorm", shape, lambda: norms.layer_norm(x, weight, bias, 1e-5), theirs, inputs)
        yield Case("LayerNorm, both ways", shape, lambda: ours(x, weight, bias, dy), theirs, inputs, (dy,))


def _gated(dtype: torch.dtype) -> Iterator[Case]:
    cases = (
        ("SwiGLU", "silu", "Llama-3-8B", 14336),
        ("GeGLU, tanh", "gelu_tanh", "Gemma-2B", 16384),
        ("GeGLU", "gelu", "T5 v1.1 XL", 5120),
    )
    for kernel, activation, model, width in cases:

        def theirs(gate: torch.Tensor, up: torch.Tensor, activation: str = activation) -> torch.Tensor:
            return _activated(gate, activation) * up

        def ours(activation: str = activation) -> Any:
            return activations.gated(gate, up, activation), activations.gated_backward(dy, gate, up, activation)

        gate, up, dy = _random(dtype, 3, 256, width)
        shape = f"{model}: 256 x {width}"
        forward = lambda: activations.gated(gate, up, activation)  # noqa: E731
        yield Case(kernel, shape, forward, theirs, (gate, up))
        yield Case(f"{kernel}, both ways", shape, ours, theirs, (gate, up), (dy,))


def _bias_gelu(dtype: torch.dtype) -> Iterator[Case]:
    for activation, model in (("gelu_tanh", "GPT-2"), ("gelu", "BERT base")):

        def theirs(x: torch.Tensor, bias: torch.Tensor, activation: str = activation) -> torch.Tensor:
            return _activated(x + bias, activation)

        def ours(activation: str = activation) -> Any:
            y = activations.bias_activation(x, bias, activation)
            return y, activations.bias_activation_backward(dy, x, bias, activation)

        (x, dy), bias = _random(dtype, 2, 1024, 3072), _random(dtype, 3072)
        kernel, shape = f"bias and {activation}", f"{model}: 1024 x 3072"
        forward = lambda: activations.bias_activation(x, bias, activation)  # noqa: E731
        yield Case(kernel, shape, forward, theirs, (x, bias))
        yield Case(f"{kernel}, both ways", shape, ours, theirs, (x, bias), (dy,))


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _rotary(dtype: torch.dtype) -> Iterator[Case]:
    def halves(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (torch.cat([table, table], -1)[:, None] for table in (cos, sin))
        turned = (torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) for x in (q, k))
        return tuple(x * cos + other * sin for x, other in zip((q, k), turned, strict=True))

    def neighbors(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = cos.shape[-1]
        cos, sin = (table.repeat_interleave(2, -1)[:, None] for table in (cos, sin))
        found = []
        for x in (q, k):
            turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
            turned = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
            found.append(torch.cat([turning * cos + turned * sin, rest], -1))
        return tuple(found)

    for model, theirs, heads, kv_heads, width, pairs in (
        ("Llama-3-8B", halves, 32, 8, 128, 64),
        ("GPT-J", neighbors, 16, 16, 256, 32),
    ):
        q = _random(dtype, 1, 1024, heads, width).transpose(1, 2)
        k = _random(dtype, 1, 1024, kv_heads, width).transpose(1, 2)
        cos, sin = _random(dtype, 2, 1, 1024, pairs)
        turn = lambda: rotary(q, k, cos, sin, theirs is neighbors)  # noqa: E731
        yield Case("rotary", f"{model}: 1024 tokens, {heads} + {kv_heads} heads", turn, theirs, (q, k, cos, sin))


def _cross_entropy(dtype: torch.dtype) -> Iterator[Case]:
    def theirs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.float(), targets)

    for model, tokens, vocabulary in (("GPT-2", 256, 50257), ("Llama-3-8B", 128, 128256)):
        logits, targets = _random(dtype, tokens, vocabulary), torch.randint(vocabulary, (tokens,))
        scales, one = torch.full((tokens,), 1 / tokens), torch.ones(())
        shape = f"{model}: {tokens} x {vocabulary}"
        forward = lambda: cross_entropy(logits, targets)[0].mean()  # noqa: E731
        both = lambda: cross_entropy_with_gradient(logits, targets, scales)  # noqa: E731
        yield Case("cross-entropy", shape, forward, theirs, (logits, targets))
        yield Case("cross-entropy, both ways", shape, both, theirs, (logits, targets), (one,))


def _quantized(dtype: torch.dtype) -> Iterator[Case]:
    weight = torch.randn(4096, 4096)
    for bits, group in ((8, None), (4, 128), (4, 32)):
        held = quantized.quantize(weight, bits, group)

        def theirs(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bits: int = bits) -> torch.Tensor:
            return functional.linear(x, reference.dequantized(values, scales, None, bits))

        for rows in (1, 8):
            x, scales = _random(dtype, rows, 4096), held.scales.to(dtype)
            shape = f"Llama-3-8B: {rows} x 4096 x 4096"
            kernel = f"int{bits}" + (f", groups of {group}" if group else "")
            yield Case(kernel, shape, lambda: quantized.linear(x, held), theirs, (x, held.values, scales))


CASES: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "gated": _gated,
    "bias_gelu": _bias_gelu,
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
    "quantized": _quantized,
}
DTYPES = ("float32", "bfloat16")
