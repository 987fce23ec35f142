"""RMSNorm and LayerNorm of rows, with a residual added before: forward and backward, one pass over memory each.

What the residual is added to may be dropped out: bool mask [rows, width], times scale where it is true. Numbers are
float32 or bfloat16, arithmetic is float32. Each function does what that of the same name in
`graphopt.cuda_ext.reference` does, and raises ValueError that names the argument which does not fit.
"""

import torch

from graphopt.cuda_ext import reference
from graphopt.cuda_ext.arguments import ELEMENTS, FLOAT32, check
from graphopt.cuda_ext.library import library

_SOURCE = "norms.cpp"
_BF16 = torch.bfloat16


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(y, x + residual or None, inverse root mean squares): y = s * inverse * (offset + weight) with s = x + residual.

    x, residual: [rows, width]; weight: [width], of the dtype of x or float32, None for 1. The sum is rounded to the
    dtype of x before the norm; inverse roots are float32 [rows].
    """
    _check(x, weight, None, residual, mask)
    native = library(_SOURCE)
    if native is None:
        return reference.rms_norm(x, weight, epsilon, residual, offset, mask, scale)
    y, summed = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    inverse = x.new_empty(x.shape[0], dtype=torch.float32)
    tensors = (x, residual, mask, weight, None, y, summed, None, inverse)
    numbers = (float(epsilon), float(offset), float(scale))
    native.call("norm", *tensors, *x.shape, *numbers, x.dtype == _BF16, _is_bf16(weight), False)
    return y, summed, inverse


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    inverse: torch.Tensor,
    dsum: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx, dweight or None) of `rms_norm`; x: what was normed, so the sum where there was a residual.

    dsum: [rows, width], the gradient of that sum from elsewhere, which dx includes. dx is the residual's gradient too.
    """
    _check_backward(dy, x, weight, dsum, {"inverse": inverse})
    native = library(_SOURCE)
    if native is None:
        return reference.rms_norm_backward(dy, x, weight, inverse, dsum, offset)
    dx, dweight = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
    tensors = (dy, x, dsum, None, weight, None, inverse, dx, None, dweight, None)
    native.call("norm_backward", *tensors, *x.shape, float(offset), 1.0, x.dtype == _BF16, _is_bf16(weight))
    return dx, dweight


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(y, x + residual or None, means, inverse standard deviations), these two float32 [rows].

    x, residual: [rows, width]; weight, bias: [width], of the dtype of x or float32.
    """
    _check(x, weight, bias, residual, mask)
    native = library(_SOURCE)
    if native is None:
        return reference.layer_norm(x, weight, bias, epsilon, residual, mask, scale)
    y, summed = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    inverse = torch.empty_like(mean)
    tensors = (x, residual, mask, weight, bias, y, summed, mean, inverse)
    types = (x.dtype == _BF16, _is_bf16(weight), _is_bf16(bias))
    native.call("norm", *tensors, *x.shape, float(epsilon), 0.0, float(scale), *types)
    return y, summed, mean, inverse


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    dsum: torch.Tensor | None = None,
    has_bias: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight or None, dbias or None) of `layer_norm`; x and dsum as for `rms_norm_backward`.

    dbias has the dtype of weight, or of dy where there is no weight.
    """
    _check_backward(dy, x, weight, dsum, {"mean": mean, "inverse": inverse})
    native = library(_SOURCE)
    if native is None:
        return reference.layer_norm_backward(dy, x, weight, mean, inverse, dsum, has_bias)
    like = dy if weight is None else weight
    dx, dweight = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
    dbias = like.new_empty(x.shape[1]) if has_bias else None
    tensors = (dy, x, dsum, None, weight, mean, inverse, dx, None, dweight, dbias)
    native.call("norm_backward", *tensors, *x.shape, 0.0, 1.0, x.dtype == _BF16, like.dtype == _BF16)
    return dx, dweight, dbias


def dropout_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    dsum: torch.Tensor | None = None,
    offset: float = 0.0,
    has_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dropped, dx, dweight or None, dbias or None): of what was dropped out, and the rest as without.

    Of `layer_norm`, or where mean is None of `rms_norm`; x, dsum and dbias as for their backward.
    """
    _check_backward(dy, x, weight, dsum, {"inverse": inverse} if mean is None else {"mean": mean, "inverse": inverse})
    check("mask", mask, x.shape, (torch.bool,))
    native = library(_SOURCE)
    if native is None:
        return reference.dropout_norm_backward(dy, x, mask, scale, weight, mean, inverse, dsum, offset, has_bias)
    like = dy if weight is None else weight
    dx, dropped = torch.empty_like(x), torch.empty_like(x)
    dweight, dbias = None if weight is None else torch.empty_like(weight), None
    if has_bias:
        dbias = like.new_empty(x.shape[1])
    tensors = (dy, x, dsum, mask, weight, mean, inverse, dx, dropped, dweight, dbias)
    native.call("norm_backward", *tensors, *x.shape, float(offset), float(scale), x.dtype == _BF16, like.dtype == _BF16)
    return dropped, dx, dweight, dbias


def _is_bf16(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == _BF16


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> None:
    check("x", x, (None, None), ELEMENTS)
    if residual is not None:
        check("residual", residual, x.shape, (x.dtype,))
    if mask is not None:
        check("mask", mask, x.shape, (torch.bool,))
        if residual is None:
            raise ValueError("mask drops what a residual is added to, and residual is None")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check(name, tensor, x.shape[1:], (x.dtype, torch.float32))


def _check_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    dsum: torch.Tensor | None,
    of_rows: dict[str, torch.Tensor],
) -> None:
    _check(x, weight, None)
    check("dy", dy, x.shape, (x.dtype,))
    if dsum is not None:
        check("dsum", dsum, x.shape, (x.dtype,))
    for name, tensor in of_rows.items():
        check(name, tensor, x.shape[:1], FLOAT32)
