"""What the kernels for the CPU are measured on: shapes of public models, each with torch's way to the same result.

Ours are called as autograd would call them: forward, then backward of what it returned. Torch's ways run under autograd
where a case trains, and without gradients where it does not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from graphopt.cuda_ext import activations, norms, quantized, reference
from graphopt.cuda_ext.cross_entropy import cross_entropy, cross_entropy_with_gradient
from graphopt.cuda_ext.rotary import rotary

Call = Callable[[], Any]


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


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def _rms_norm(dtype: torch.dtype) -> Iterator[Case]:
    for model, rows, width in (("one token", 1, 4096), ("Llama-3-8B", 1024, 4096), ("Llama-3.2-1B", 1024, 2048)):
        yield from _rms_norm_of(dtype, model, rows, width)


def _rms_norm_of(dtype: torch.dtype, model: str, rows: int, width: int) -> Iterator[Case]:
    x, residual, dy = _random(dtype, 3, rows, width)
    weight = _random(dtype, width)

    def forward() -> Any:
        return norms.rms_norm(x, weight, 1e-5, residual)

    def both() -> Any:
        y, summed, inverse = forward()
        return y, norms.rms_norm_backward(dy, summed, weight, inverse, dy)

    def theirs(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        summed = x + residual
        return functional.rms_norm(summed, weight.shape, weight, 1e-5), summed

    shape, inputs = f"{model}: {rows} x {width}", (x, residual, weight)
    yield Case("RMSNorm, add", shape, forward, theirs, inputs)
    yield Case("RMSNorm, add, both ways", shape, both, theirs, inputs, (dy, dy))


def _layer_norm(dtype: torch.dtype) -> Iterator[Case]:
    for model, rows, width in (("GPT-2", 1024, 768), ("OPT-6.7B", 1024, 4096)):
        yield from _layer_norm_of(dtype, model, rows, width)


def _layer_norm_of(dtype: torch.dtype, model: str, rows: int, width: int) -> Iterator[Case]:
    x, dy = _random(dtype, 2, rows, width)
    weight, bias = _random(dtype, 2, width)

    def forward() -> Any:
        return norms.layer_norm(x, weight, bias, 1e-5)

    def both() -> Any:
        y, _, mean, inverse = forward()
        return y, norms.layer_norm_backward(dy, x, weight, mean, inverse)

    def theirs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    shape, inputs = f"{model}: {rows} x {width}", (x, weight, bias)
    yield Case("LayerNorm", shape, forward, theirs, inputs)
    yield Case("LayerNorm, both ways", shape, both, theirs, inputs, (dy,))


def _gated(dtype: torch.dtype) -> Iterator[Case]:
    yield from _gated_of(dtype, "SwiGLU", "silu", "Llama-3-8B", 14_336)
    yield from _gated_of(dtype, "GeGLU, tanh", "gelu_tanh", "Gemma-2B", 16_384)
    yield from _gated_of(dtype, "GeGLU", "gelu", "T5 v1.1 XL", 5120)


def _gated_of(dtype: torch.dtype, kernel: str, activation: str, model: str, width: int) -> Iterator[Case]:
    gate, up, dy = _random(dtype, 3, 256, width)

    def forward() -> Any:
        return activations.gated(gate, up, activation)

    def both() -> Any:
        return forward(), activations.gated_backward(dy, gate, up, activation)

    def theirs(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _activated(gate, activation) * up

    shape = f"{model}: 256 x {width}"
    yield Case(kernel, shape, forward, theirs, (gate, up))
    yield Case(f"{kernel}, both ways", shape, both, theirs, (gate, up), (dy,))


def _bias_gelu(dtype: torch.dtype) -> Iterator[Case]:
    yield from _bias_gelu_of(dtype, "gelu_tanh", "GPT-2")
    yield from _bias_gelu_of(dtype, "gelu", "BERT base")


def _bias_gelu_of(dtype: torch.dtype, activation: str, model: str) -> Iterator[Case]:
    (x, dy), bias = _random(dtype, 2, 1024, 3072), _random(dtype, 3072)

    def forward() -> Any:
        return activations.bias_activation(x, bias, activation)

    def both() -> Any:
        return forward(), activations.bias_activation_backward(dy, x, bias, activation)

    def theirs(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return _activated(x + bias, activation)

    kernel, shape = f"bias, {activation}", f"{model}: 1024 x 3072"
    yield Case(kernel, shape, forward, theirs, (x, bias))
    yield Case(f"{kernel}, both ways", shape, both, theirs, (x, bias), (dy,))


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _rotary(dtype: torch.dtype) -> Iterator[Case]:
    yield _rotary_of(dtype, "Llama-3-8B", (32, 8), 128, 64, interleaved=False)
    yield _rotary_of(dtype, "GPT-J", (16, 16), 256, 32, interleaved=True)


def _rotary_of(
    dtype: torch.dtype, model: str, heads: tuple[int, int], width: int, pairs: int, interleaved: bool
) -> Case:
    q, k = (_random(dtype, 1, 1024, each, width).transpose(1, 2) for each in heads)
    cos, sin = _random(dtype, 2, 1, 1024, pairs)

    def turned(x: torch.Tensor) -> torch.Tensor:
        if interleaved:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return torch.cat([-x[..., pairs:], x[..., :pairs]], -1)

    def theirs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = []
        cos, sin = (
            (each.repeat_interleave(2, -1) if interleaved else torch.cat([each, each], -1))[:, None]
            for each in tensors[2:]
        )
        for x in tensors[:2]:
            turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
            result = turning * cos + turned(turning) * sin
            found.append(torch.cat([result, rest], -1) if rest.shape[-1] else result)
        return tuple(found)

    shape = f"{model}: 1024 tokens, {heads[0]} + {heads[1]} heads"
    return Case("rotary", shape, lambda: rotary(q, k, cos, sin, interleaved), theirs, (q, k, cos, sin))


def _cross_entropy(dtype: torch.dtype) -> Iterator[Case]:
    yield from _cross_entropy_of(dtype, "GPT-2", 256, 50_257)
    yield from _cross_entropy_of(dtype, "Llama-3-8B", 128, 128_256)


def _cross_entropy_of(dtype: torch.dtype, model: str, tokens: int, vocabulary: int) -> Iterator[Case]:
    logits, targets = _random(dtype, tokens, vocabulary), torch.randint(vocabulary, (tokens,))
    scales = torch.full((tokens,), 1 / tokens)

    def theirs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.float(), targets)

    def forward() -> Any:
        return cross_entropy(logits, targets)[0].mean()

    def both() -> Any:
        losses, _, gradient = cross_entropy_with_gradient(logits, targets, scales)
        return losses.mean(), gradient

    shape = f"{model}: {tokens} x {vocabulary}"
    yield Case("cross-entropy", shape, forward, theirs, (logits, targets))
    yield Case("cross-entropy, both ways", shape, both, theirs, (logits, targets), (torch.ones(()),))


def _quantized(dtype: torch.dtype) -> Iterator[Case]:
    weight = torch.randn(4096, 4096)
    for bits, group in ((8, None), (4, 128), (4, 32)):
        held = quantized.quantize(weight, bits, group)
        for rows in (1, 8):
            yield _quantized_of(dtype, held, rows)


def _quantized_of(dtype: torch.dtype, held: quantized.Quantized, rows: int) -> Case:
    x, scales = _random(dtype, rows, held.inputs), held.scales.to(dtype)

    def theirs(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, reference.dequantized(values, scales, None, held.bits))

    def ours() -> torch.Tensor:
        return quantized.linear(x, held)

    shape = f"Llama-3-8B: {rows} x {held.inputs} x {held.outputs}"
    return Case(f"int{held.bits}, groups of {held.group}", shape, ours, theirs, (x, held.values, scales))


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
