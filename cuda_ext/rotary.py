"""Rotary position embedding of queries and keys in one call (Su et al., RoFormer, arXiv:2104.09864)."""

import ctypes

import torch

from graphopt.cuda_ext import reference
from graphopt.cuda_ext.arguments import ELEMENTS, check
from graphopt.cuda_ext.library import library

_BF16 = torch.bfloat16


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inverse: bool = False,
    apart: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, each pair of elements turned by the angle of its position: (a, b) to (a cos - b sin, b cos + a sin).

    q: [batch, heads, positions, width]; k: the same with heads of its own. Both may have any strides but in the last
    dimension; results are laid out as they are. cos, sin: [batch or 1, positions, pairs], of the dtype of q or float32.

    interleaved: pairs are neighbors (2i, 2i + 1), as in GPT-J; else (i, i + pairs), as in GPT-NeoX and Llama. What
    lies behind the pairs is copied. inverse: turned by the negative angle, which is the backward of the same without.
    apart: neighbors come out as (i, i + pairs), as in DeepSeek; with inverse, these as neighbors.

    Raises ValueError that names the argument which does not fit.
    """
    check("q", q, (None, None, None, None), ELEMENTS, is_contiguous=False)
    batch, _, positions, width = q.shape
    check("k", k, (batch, None, positions, width), (q.dtype,), is_contiguous=False)
    check("cos", cos, (None, positions, None), (q.dtype, torch.float32), is_contiguous=False)
    check("sin", sin, cos.shape, (cos.dtype,), is_contiguous=False)
    if cos.shape[0] not in (1, batch):
        raise ValueError(f"cos is for a batch of {cos.shape[0]}, q has one of {batch}")
    pairs = cos.shape[2]
    if 2 * pairs > width:
        raise ValueError(f"cos has {pairs} pairs, q has no more than {width // 2} in its width of {width}")
    native = library("rotary.cpp")
    if native is None:
        return reference.rotary(q, k, cos, sin, interleaved, inverse, apart)
    to_q, to_k = torch.empty_like(q), torch.empty_like(k)
    tensors = _words(q, to_q) + _words(k, to_k)
    angles = (cos.data_ptr(), sin.data_ptr(), *_angle_strides(cos), *_angle_strides(sin))
    native.call(
        "rotary",
        (ctypes.c_int64 * len(tensors))(*tensors),
        2,
        (ctypes.c_int64 * len(angles))(*angles),
        -1.0 if inverse else 1.0,
        *(batch, positions, pairs, width),
        *(interleaved and not (apart and inverse), interleaved and (inverse or not apart)),
        *(q.dtype == _BF16, cos.dtype == _BF16),
    )
    return to_q, to_k


def _words(tensor: torch.Tensor, result: torch.Tensor) -> tuple[int, ...]:
    """`Heads` of rotary.cpp."""
    return (tensor.data_ptr(), result.data_ptr(), tensor.shape[1], *tensor.stride()[:3], *result.stride()[:3])


def _angle_strides(table: torch.Tensor) -> tuple[int, int]:
    return (0 if table.shape[0] == 1 else table.stride(0)), table.stride(1)
