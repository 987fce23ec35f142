"""Gated and biased activations on a GPU; functions have the arguments and results of those in `reference`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels.launch import launch, multiprocessors, power_of_two, rows_of

_ELEMENTS = 2048  # of a tile
_WARPS = 4  # 16 elements of each tensor in a thread
_BIAS_WARPS = 8  # 8 elements: with 16, the derivative of "gelu" spills (resources.json)
_WIDEST = 1024  # columns of a tile that has a bias: so that each element of it serves two rows at least
_PROGRAMS = 8  # of a multiprocessor, in backward of a bias, where each sums many rows


@triton.jit
def _share(x, ACTIVATION: tl.constexpr):
    """What x is multiplied by."""
    if ACTIVATION == "gelu":
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # root of 1/2
    if ACTIVATION == "gelu_tanh":
        x = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # twice the root of 2/pi
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _derivative(x, share, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 over the root of 2 pi
    slope = share * (1.0 - share)
    if ACTIVATION == "gelu_tanh":
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return share + x * slope


@triton.jit
def _gated_forward(GATE, UP, Y, gate_stride, up_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(GATE + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate * _share(gate, ACTIVATION) * up
    tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    GRADIENT, GATE, UP, OF_GATE, OF_UP, gradient_stride, gate_stride, up_stride, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gradient = tl.load(GRADIENT + row * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    share = _share(gate, ACTIVATION)
    of_gate = gradient * up * _derivative(gate, share, ACTIVATION)
    of_up = gradient * gate * share
    tl.store(OF_GATE + row * width + columns, of_gate.to(OF_GATE.dtype.element_ty), mask=inside)
    tl.store(OF_UP + row * width + columns, of_up.to(OF_UP.dtype.element_ty), mask=inside)


@triton.jit
def _bias_forward(
    X, BIAS, Y, x_stride, rows, width, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (columns < width)
    x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS is not None:
        x += tl.load(BIAS + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(Y + row * width + columns, (x * _share(x, ACTIVATION)).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _bias_backward(
    GRADIENT, X, BIAS, OF_X, OF_BIAS, gradient_stride, x_stride, rows, width, parts,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    part = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK
    columns = first + tl.arange(0, BLOCK)[None, :]
    of_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(part, tl.cdiv(rows, ROWS), parts):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (row < rows) & (columns < width)
        gradient = tl.load(GRADIENT + row * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if BIAS is not None:
            x += tl.load(BIAS + columns, mask=columns < width, other=0.0).to(tl.float32)
        of_x = gradient * _derivative(x, _share(x, ACTIVATION), ACTIVATION)
        tl.store(OF_X + row * width + columns, of_x.to(OF_X.dtype.element_ty), mask=inside)
        if OF_BIAS is not None:
            of_bias += of_x
    if OF_BIAS is not None:
        column = first + tl.arange(0, BLOCK)
        tl.store(OF_BIAS + part.to(tl.int64) * width + column, tl.sum(of_bias, axis=0), mask=column < width)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gates, ups = _flat(gate, up)
    width = gates.shape[1]
    launch(_gated_forward, len(gates) * triton.cdiv(width, _ELEMENTS), gates, ups, y, gates.stride(0), ups.stride(0),
           width, warps=_WARPS, ACTIVATION=activation, BLOCK=_ELEMENTS)  # fmt: skip
    return y


def gated_backward(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    of_gate, of_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    gradients, gates, ups = _flat(gradient, gate, up)
    width = gates.shape[1]
    launch(_gated_backward, len(gates) * triton.cdiv(width, _ELEMENTS), gradients, gates, ups, of_gate, of_up,
           gradients.stride(0), gates.stride(0), ups.stride(0), width,
           warps=_WARPS, ACTIVATION=activation, BLOCK=_ELEMENTS)  # fmt: skip
    return of_gate, of_up


def bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = _flat(x)[0] if bias is None else rows_of(x)
    count, width = rows.shape
    height, block = _tile(width)
    programs = triton.cdiv(count, height) * triton.cdiv(width, block)
    launch(_bias_forward, programs, rows, bias, y, rows.stride(0), count, width,
           warps=_BIAS_WARPS, ACTIVATION=activation, ROWS=height, BLOCK=block)  # fmt: skip
    return y


def bias_activation_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gradients, rows = _flat(gradient, x) if bias is None else (rows_of(gradient), rows_of(x))
    count, width = rows.shape
    height, block = _tile(width)
    blocks, parts = triton.cdiv(width, block), triton.cdiv(count, height)
    if bias is not None:
        parts = min(parts, triton.cdiv(_PROGRAMS * multiprocessors(x.device), max(1, blocks)))
    partial = None if bias is None else torch.empty(parts, width, dtype=torch.float32, device=x.device)
    launch(_bias_backward, parts * blocks, gradients, rows, bias, of_x, partial, gradients.stride(0), rows.stride(0),
           count, width, parts, warps=_BIAS_WARPS, ACTIVATION=activation, ROWS=height, BLOCK=block)  # fmt: skip
    if partial is None or bias is None:
        return of_x, torch.empty(0, dtype=torch.float32, device=x.device)
    return of_x, partial.sum(0).to(bias.dtype)


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All as one row where none has gaps, else as rows."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return tuple(tensor.view(1, tensor.numel()) for tensor in tensors)
    return tuple(map(rows_of, tensors))


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block = min(_WIDEST, power_of_two(width))
    return _ELEMENTS // block, block
