"""Checks of what operators of attention are given: ValueError names the argument, what it is, and what it may be."""

import math

import torch
from torch import Tensor

from graphopt.triton_kernels.attention.masks import Blocks, Mask
from graphopt.triton_kernels.registration import check_floating, check_same, describe

_DIMENSIONS = 4
_LEAST_BLOCK = 16  # of a product of matrices


def _check(operator: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    check_floating(operator, "q", q, _DIMENSIONS)
    if q.dim() != _DIMENSIONS or q.shape[-1] == 0:
        raise ValueError(f"{operator}: q is {describe(q)}, not [batch, heads, queries, width]")
    batch, heads, _, width = q.shape
    fits = k.dim() == _DIMENSIONS and (k.shape[0], k.shape[3]) == (batch, width)
    if not fits or k.dtype != q.dtype or k.device != q.device:
        raise ValueError(
            f"{operator}: k is {describe(k)}, which differs from q, {describe(q)}, by more than heads and keys"
        )
    if heads == 0 or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"{operator}: k has {k.shape[1]} heads, which do not divide the {heads} of q")
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"{operator}: v is {describe(v)}, not {describe(k)} as k")
    if not 0 < scale < math.inf:
        raise ValueError(f"{operator}: scale is {scale}, not positive and finite")


def check_mask(operator: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    _check(operator, q, k, v, mask.scale)
    starts, key_starts, _, window, _ = mask
    if window is not None and window < 1:
        raise ValueError(f"{operator}: window is {window}, not at least 1, the key beside a query")
    if starts is None and key_starts is None:
        return
    if q.shape[0] != 1:
        raise ValueError(f"{operator}: q is {describe(q)}, but packed sequences, as starts say, have a batch of one")
    for name, given, own, count in (("starts", starts, "q", q.shape[2]), ("key_starts", key_starts, "k", k.shape[2])):
        if given is None:
            raise ValueError(f"{operator}: {name} is None, but not that of {'k' if own == 'q' else 'q'}: give both")
        if (
            given.dim() != 1
            or len(given) < 2
            or given.dtype not in (torch.int32, torch.int64)
            or given.device != q.device
        ):
            raise ValueError(
                f"{operator}: {name} is {describe(given)}, not int32 or int64 [sequences + 1] on {q.device}"
            )
        if given.is_cpu and not (given[0] == 0 and given[-1] == count and bool((given.diff() >= 0).all())):
            raise ValueError(
                f"{operator}: {name} is {given.tolist()}, which does not rise from 0 to {count}, as {own} has"
            )
    if starts is not None and key_starts is not None and starts.shape != key_starts.shape:
        raise ValueError(f"{operator}: key_starts is {describe(key_starts)}, not {describe(starts)} as starts")


def check_blocks(operator: str, q: Tensor, k: Tensor, v: Tensor, listed: Blocks) -> None:
    _check(operator, q, k, v, listed.scale)
    row_offsets, row_blocks, column_offsets, column_blocks, block, _, _ = listed
    if block < _LEAST_BLOCK or block & (block - 1):
        raise ValueError(f"{operator}: block is {block}, not a power of two from {_LEAST_BLOCK}")
    rows, columns = (-(-x.shape[2] // block) for x in (q, k))
    lists = (("row", row_offsets, row_blocks, rows), ("column", column_offsets, column_blocks, columns))
    for name, offsets, blocks, count in lists:
        for each, part in ((offsets, "offsets"), (blocks, "blocks")):
            if each.dtype != torch.int32 or each.device != q.device:
                raise ValueError(f"{operator}: {name}_{part} is {describe(each)}, not int32 on {q.device}")
        if offsets.dim() != 2 or offsets.shape[0] not in (1, q.shape[1]) or offsets.shape[1] != count + 1:
            raise ValueError(
                f"{operator}: {name}_offsets is {describe(offsets)}, not [1 or {q.shape[1]}, {count + 1}]: the layout"
                f" has to be of {rows} x {columns} blocks of {block}"
            )
        if blocks.shape != row_blocks.shape[:1]:
            raise ValueError(
                f"{operator}: {name}_blocks is {describe(blocks)}, not {describe(row_blocks)} as row_blocks"
            )


def check_results(operator: str, gradient: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
    check_same(operator, "gradient", gradient, q)
    check_same(operator, "out", out, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    if lse.shape != q.shape[:3] or lse.dtype != wide or lse.device != q.device:
        raise ValueError(f"{operator}: lse is {describe(lse)}, not {wide} {list(q.shape[:3])} on {q.device}")
