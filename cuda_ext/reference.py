"""What kernels compute, in torch's operators: they are tested against this, and it stands in for them.

Rows are all but the last dimension. Arithmetic is float64 where a tensor is, else float32; results are rounded once, to
the dtype that kernels return, and contiguous.
"""

import math

import torch
from torch.nn import functional

Pair = tuple[torch.Tensor, torch.Tensor]


def summed(
    x: torch.Tensor, residual: torch.Tensor | None, mask: torch.Tensor | None, scale: float
) -> torch.Tensor | None:
    """What a norm is of, where a residual is added; with a mask, to what dropout leaves."""
    if residual is None:
        return None
    kept = x if mask is None else _wide(x) * mask * scale
    return (kept.contiguous() + residual).to(x.dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    total = summed(x, residual, mask, scale)
    s = _wide(x if total is None else total)
    inverse = (s.square().mean(-1) + epsilon).rsqrt()
    return (s * inverse[..., None] * _weights(weight, s, offset)).to(x.dtype), total, inverse


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    inverse: torch.Tensor,
    dsum: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    normed, d = _wide(x) * inverse[..., None], _wide(dy)
    g = d * _weights(weight, normed, offset)
    dx = inverse[..., None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return _with(dx, dsum, x), None if weight is None else _over_rows(d * normed).to(weight.dtype)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    total = summed(x, residual, mask, scale)
    s = _wide(x if total is None else total)
    mean = s.mean(-1)
    centered = s - mean[..., None]
    inverse = (centered.square().mean(-1) + epsilon).rsqrt()
    y = centered * inverse[..., None] * _weights(weight, s)
    return _with(y, bias, x), total, mean, inverse


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    dsum: torch.Tensor | None = None,
    has_bias: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    normed, d = (_wide(x) - mean[..., None]) * inverse[..., None], _wide(dy)
    g = d * _weights(weight, normed)
    dx = inverse[..., None] * (g - normed * (g * normed).mean(-1, keepdim=True) - g.mean(-1, keepdim=True))
    dweight = None if weight is None else _over_rows(d * normed).to(weight.dtype)
    dbias = _over_rows(d).to((dy if weight is None else weight).dtype) if has_bias else None
    return _with(dx, dsum, x), dweight, dbias


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
    dbias = None
    if mean is None:
        dx, dweight = rms_norm_backward(dy, x, weight, inverse, dsum, offset)
    else:
        dx, dweight, dbias = layer_norm_backward(dy, x, weight, mean, inverse, dsum, has_bias)
    return (_wide(dx) * mask * scale).to(x.dtype), dx, dweight, dbias


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return (_value(_wide(gate), activation) * _wide(up)).to(gate.dtype)


def gated_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Pair:
    d, g = _wide(dy), _wide(gate)
    dgate = d * _wide(up) * _slope(g, activation)
    return dgate.to(gate.dtype), (d * _value(g, activation)).to(up.dtype)


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    return _value(_plus(_wide(x), bias), activation).to(x.dtype)


def bias_activation_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dx = _wide(dy) * _slope(_plus(_wide(x), bias), activation)
    return dx.to(x.dtype), None if bias is None else _over_rows(dx).to(bias.dtype)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inverse: bool = False,
    apart: bool = False,
) -> Pair:
    c, s = _wide(cos)[:, None], _wide(sin)[:, None] * (-1 if inverse else 1)
    layouts = interleaved and not (apart and inverse), interleaved and (inverse or not apart)
    return _turned(q, c, s, *layouts), _turned(k, c, s, *layouts)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Pair:
    is_counted, x = targets != ignore_index, _wide(logits)
    log_normalizers = x.logsumexp(-1).where(is_counted, 0)
    at_target = x.gather(-1, targets.where(is_counted, 0)[..., None])[..., 0]
    losses = (1 - label_smoothing) * (log_normalizers - at_target) + z_loss * log_normalizers.square()
    if label_smoothing:
        losses = losses + label_smoothing * (log_normalizers - x.mean(-1))
    return losses.where(is_counted, 0), log_normalizers


def cross_entropy_backward(
    dlosses: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_normalizers: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    is_counted, of_rows = (targets != ignore_index)[..., None], log_normalizers[..., None]
    even = label_smoothing / max(logits.shape[-1], 1)
    dx = (_wide(logits) - of_rows).exp() * (1 + 2 * z_loss * of_rows) - even
    at_target = targets[..., None].where(is_counted, 0)
    dx = dx.scatter_add(-1, at_target, torch.full_like(of_rows, label_smoothing - 1))
    return (dx * dlosses[..., None]).where(is_counted, 0).to(logits.dtype)


def cross_entropy_part(
    logits: torch.Tensor, targets: torch.Tensor, has_totals: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x, is_here = _wide(logits), targets >= 0
    largest = x.amax(-1)
    powers = (x - _finite(largest)[..., None]).exp().sum(-1)
    chosen = x.gather(-1, targets.where(is_here, 0)[..., None])[..., 0].where(is_here, 0)
    return largest, powers, chosen, x.sum(-1) if has_totals else None


def cross_entropy_part_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    largest: torch.Tensor,
    of_powers: torch.Tensor,
    of_chosen: torch.Tensor,
    of_totals: torch.Tensor | None,
) -> torch.Tensor:
    is_here = targets >= 0
    dx = (_wide(logits) - _finite(largest)[..., None]).exp() * of_powers[..., None]
    if of_totals is not None:
        dx = dx + of_totals[..., None]
    at_target = targets.where(is_here, 0)[..., None]
    return dx.scatter_add(-1, at_target, of_chosen.where(is_here, 0)[..., None]).to(logits.dtype)


def _finite(largest: torch.Tensor) -> torch.Tensor:
    """What is taken from logits before their exponentials: 0 where all of them are minus infinity."""
    return largest.masked_fill(largest == -math.inf, 0)


def cross_entropy_with_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, log_normalizers = cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
    )
    gradient = cross_entropy_backward(
        torch.ones_like(losses) if scales is None else scales,
        logits,
        targets,
        log_normalizers,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return losses, log_normalizers, gradient


def quantized(
    weight: torch.Tensor, bits: int, group: int, has_zeros: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales and zeros as in `graphopt.cuda_ext.quantized.Quantized`; zeros also where they are the middle."""
    outputs, inputs = weight.shape
    groups = weight.detach().float().reshape(outputs, inputs // group, group)
    low, high = (-128, 127) if bits == 8 else (0, 15)
    middle = 0 if bits == 8 else 8
    if has_zeros:
        smallest, largest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        steps = (largest - smallest) / (high - low)
    else:
        steps = groups.abs().amax(-1) / (high - middle)
    scales = torch.where(steps.isfinite(), torch.where(steps == 0, 1.0, steps), torch.nan)
    zeros = (low - smallest / scales).round() if has_zeros else torch.full_like(scales, middle)
    values = (groups / scales[..., None] + zeros[..., None]).round().clamp(low, high).nan_to_num(0)
    if bits == 8:
        return values.to(torch.int8).reshape(outputs, inputs), scales, zeros
    return packed(values).reshape(outputs, inputs // 2), scales, zeros


def packed(values: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 15, [..., size], two in a byte: uint8 [..., size / 2], the first half in the low bits."""
    low, high = values.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def unpacked(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values & 15, values >> 4], dim=-1)


def dequantized(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Weights as `graphopt.cuda_ext.quantized.Quantized` stores them, as numbers of the dtype of scales."""
    groups = values.reshape(*scales.shape, values.shape[1] // max(scales.shape[1], 1))
    if bits == 4:
        groups = unpacked(groups)
    middle = zeros[..., None] if zeros is not None else 0 if bits == 8 else 8
    return ((groups.to(scales.dtype) - middle) * scales[..., None]).flatten(1)


def quantized_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    weight = dequantized(values, scales, zeros, bits)
    return _plus(_wide(x) @ weight.T.to(_wide(x).dtype), bias).to(x.dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().to(torch.promote_types(tensor.dtype, torch.float32))


def _over_rows(wide: torch.Tensor) -> torch.Tensor:
    return wide.reshape(wide.shape[:-1].numel(), wide.shape[-1]).sum(0)


def _weights(weight: torch.Tensor | None, like: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    return like.new_ones(()) if weight is None else _wide(weight) + offset


def _plus(wide: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    return wide if other is None else wide + _wide(other)


def _with(wide: torch.Tensor, other: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return _plus(wide, other).to(like.dtype)


def _value(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        share = x.sigmoid()
        return share * (1 + x * (1 - share))
    if activation == "gelu":
        return ((x * math.sqrt(0.5)).erf() + 1) * 0.5 + x * (x.square() * -0.5).exp() / math.sqrt(2 * math.pi)
    root, cubic = math.sqrt(8 / math.pi), 0.044715  # 1 + tanh(u) = 2 sigmoid(2 u)
    share = (x * root * (x.square() * cubic + 1)).sigmoid()
    return share * (1 + x * (1 - share) * (x.square() * (3 * cubic) + 1) * root)


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, from_interleaved: bool, to_interleaved: bool
) -> torch.Tensor:
    pairs = cos.shape[-1]
    turning, rest = _wide(x[..., : 2 * pairs]), x[..., 2 * pairs :]
    a, b = turning.unflatten(-1, (pairs, 2)).unbind(-1) if from_interleaved else turning.chunk(2, dim=-1)
    halves = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(halves, -1).flatten(-2) if to_interleaved else torch.cat(halves, -1)
    return torch.empty_like(x).copy_(torch.cat([turned.to(x.dtype), rest], -1))
