"""Attention that leaves much out: windows, packed sequences, blocks. What operators compute is written in `reference`.

    attention(q, k, v, window=4096, causal=True)    of a model; what torch's own attention does as fast, it does
    SparseAttention(layout, block)                  a module, of a layout as `layouts` makes them

Each is one operator in a captured graph, and so is its backward.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.triton_kernels.attention.arguments import check_blocks, check_mask, check_results
from graphopt.triton_kernels.attention.layouts import lists
from graphopt.triton_kernels.attention.masks import Blocks, Mask
from graphopt.triton_kernels.attention.reference import empty_like
from graphopt.triton_kernels.choice import VARIABLE, Choice, Family, mode_of_kernels
from graphopt.triton_kernels.registration import define


class _Attention(Family):
    """Rows of float32 are half as wide: wider ones leave no registers."""

    def widest_of(self, dtype: torch.dtype) -> int:
        return self.widest // 2 if dtype == torch.float32 else self.widest


FAMILY = _Attention("attention", widest=256, of_models=True)
_MASK = "Tensor? starts, Tensor? key_starts, bool causal, int? window, float scale"
_LISTS = "Tensor row_offsets, Tensor row_blocks, Tensor column_offsets, Tensor column_blocks"
_BLOCKS = f"{_LISTS}, int block, bool causal, float scale"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    starts: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """[batch, heads, queries, width], for q of this shape and k, v: [batch, key heads, keys, width].

    The last query stands beside the last key. causal: none reads a key behind the one beside it. window: keys that a
    query reads on a side at most, with the one beside it. scale: of scores, by default 1 / sqrt(width).

    starts, key_starts: where each of several sequences begins that are packed one behind another, and where the last
    ends, int32 or int64 [sequences + 1], with a batch of one; those of keys by default as of queries. On a GPU, which
    would have to be waited for, it is not checked that they rise to the number of rows.

    Raises ValueError that names an argument which does not fit.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if choose(q, k, causal, window, starts).variant == "torch":
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    out: Tensor = ATTENTION(q, k, v, starts, starts if key_starts is None else key_starts, causal, window, scale)[0]
    return out


def choose(q: Tensor, k: Tensor, causal: bool, window: int | None, starts: Tensor | None) -> Choice:
    """How `attention` is computed: by torch's own where nothing, or what is behind a query alone, is masked."""
    is_dense = window is None and starts is None and (not causal or q.shape[2] == k.shape[2])
    if is_dense and mode_of_kernels() != "triton":
        return Choice("torch", f"torch's own is as fast where all is read; {VARIABLE}=triton takes Triton's")
    return FAMILY.choose(q)


class SparseAttention(nn.Module):
    """Attention of blocks that a layout names: q, k, v as of `attention`, the result too.

    layout: bool [heads or 1, rows, columns], of blocks of queries and of keys, from `layouts` or of your own. block:
    queries and keys of one, a power of two from 16. Sequences are as long as the layout says, up to a part of the last
    block. causal, scale: as of `attention`; keys are then as many as queries.
    """

    def __init__(self, layout: Tensor, block: int, *, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.block, self.causal, self.scale = block, causal, scale
        for name, found in (("row", lists(layout)), ("column", lists(layout.mT))):
            self.register_buffer(f"{name}_offsets", found.offsets, persistent=False)
            self.register_buffer(f"{name}_blocks", found.blocks, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale
        listed = (self.row_offsets, self.row_blocks, self.column_offsets, self.column_blocks)
        out: Tensor = SPARSE_ATTENTION(q, k, v, *listed, self.block, self.causal, scale)[0]
        return out


def _attention(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    check_mask("attention", q, k, v, Mask(*mask))
    return FAMILY.run("attention", q, k, v, Mask(*mask))  # type: ignore[no-any-return]


def _attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_mask("attention_backward", q, k, v, Mask(*mask))
    check_results("attention_backward", gradient, q, out, lse)
    return FAMILY.run("attention_backward", gradient, q, k, v, out, lse, Mask(*mask))  # type: ignore[no-any-return]


def _sparse_attention(q: Tensor, k: Tensor, v: Tensor, *blocks: Any) -> tuple[Tensor, Tensor]:
    check_blocks("sparse_attention", q, k, v, Blocks(*blocks))
    return FAMILY.run("sparse_attention", q, k, v, Blocks(*blocks))  # type: ignore[no-any-return]


def _sparse_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *blocks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_blocks("sparse_attention_backward", q, k, v, Blocks(*blocks))
    check_results("sparse_attention_backward", gradient, q, out, lse)
    return FAMILY.run("sparse_attention_backward", gradient, q, k, v, out, lse, Blocks(*blocks))  # type: ignore[no-any-return]


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(q), empty_like(k), empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Tensors come first; both operators have three options behind them."""
    (q, k, v, *others), ctx.options = inputs[:-3], inputs[-3:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *others)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *ATTENTION_BACKWARD(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 5


def _backward_of_sparse(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *SPARSE_ATTENTION_BACKWARD(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 7


_SAVED = "Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
ATTENTION_BACKWARD = define(
    f"attention_backward({_SAVED}, {_MASK}) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
    family=FAMILY,
)
SPARSE_ATTENTION_BACKWARD = define(
    f"sparse_attention_backward({_SAVED}, {_BLOCKS}) -> (Tensor, Tensor, Tensor)",
    _sparse_attention_backward,
    _fake_backward,
    family=FAMILY,
)
ATTENTION = define(
    f"attention(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor, Tensor)",
    _attention,
    _fake,
    save=_save,
    backward=_backward,
    family=FAMILY,
)
SPARSE_ATTENTION = define(
    f"sparse_attention(Tensor q, Tensor k, Tensor v, {_BLOCKS}) -> (Tensor, Tensor)",
    _sparse_attention,
    _fake,
    save=_save,
    backward=_backward_of_sparse,
    family=FAMILY,
)
