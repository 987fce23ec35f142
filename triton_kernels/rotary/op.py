"""The operator of rotary embedding. What it computes is written in `reference`."""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_CPU, Family
from graphopt.triton_kernels.registration import check_floating, define, describe

FAMILY = Family("rotary", widest=2048, native=OF_CPU)
_DIMENSIONS = 4


def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, apart: bool = False
) -> Any:
    check_floating("rotary", "q", q, _DIMENSIONS)
    if q.dim() != _DIMENSIONS:
        raise ValueError(f"rotary: q is {describe(q)}, not [batch, heads, positions, width]")
    batch, _, positions, width = q.shape
    if k.dim() != _DIMENSIONS or (k.shape[0], *k.shape[2:]) != (batch, positions, width) or _apart(k, q):
        raise ValueError(f"rotary: k is {describe(k)}, which differs from q, {describe(q)}, by more than its heads")
    for name, angle in (("cos", cos), ("sin", sin)):
        fits = angle.dim() == 3 and angle.shape[0] in (1, batch) and angle.shape[1] == positions
        if not fits or 2 * angle.shape[2] > width or angle.device != q.device or not angle.is_floating_point():
            wanted = f"[{batch} or 1, {positions}, at most {width // 2}] on {q.device}"
            raise ValueError(f"rotary: {name} is {describe(angle)}, not floating {wanted}")
    if cos.shape != sin.shape:
        raise ValueError(f"rotary: sin is {describe(sin)}, but cos is {describe(cos)}")
    if apart and not interleaved:
        raise ValueError("rotary: apart is True, which goes with interleaved: other pairs lie apart anyway")
    return FAMILY.run("rotary", q, k, cos, sin, interleaved, inverse, apart)


def _apart(one: Tensor, other: Tensor) -> bool:
    return one.dtype != other.dtype or one.device != other.device


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.inverse, ctx.apart = inputs
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rotary: cos and sin are constants, and one of them requires a gradient: detach it")
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
    options = (ctx.interleaved, not ctx.inverse, *([True] if ctx.apart else []))
    return *ROTARY(of_q, of_k, *ctx.saved_tensors, *options), *[None] * 5


ROTARY = define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, bool apart=False)"
    " -> (Tensor, Tensor)",
    _rotary,
    lambda q, k, cos, sin, interleaved, inverse, apart=False: (torch.empty_like(q), torch.empty_like(k)),
    save=_save,
    backward=_backward,
    family=FAMILY,
)
