"""Context parallelism balanced for causal masks: sequences of which each rank has a chunk of either end.

Cut in the order of the whole, the first rank's queries would see few keys and the last rank's all. So the sequence is
cut into twice as many chunks as there are ranks n, and rank r has chunks r and 2 * n - 1 - r, which see as many keys
as any other rank's (the zigzag order of ring attention, Liu et al. 2023, arXiv:2310.01889; for the imbalance see
Brandon et al. 2023, Striped Attention, arXiv:2311.09431). Keys and values are gathered, as in Llama 3 (Grattafiori et
al. 2024, arXiv:2407.21783, section 3.3.2), in forward and again in backward, so that a rank saves only its own; their
gradients are summed to their ranks.

    fold                a whole -> its rows so that the ranks' parts follow each other     backward: unfold
    unfold              the inverse                                                        backward: fold
    context_attention   own rows of queries, keys and values -> own rows of the result

They are operators of forward programs. Of step programs are ATTEND and ATTEND_BACKWARD, which depend on the rank but
communicate nothing (`graphopt.runtime.folded`).
"""

from typing import Any

import torch

from graphopt.ir import moves

functional = moves.functional

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("fold(Tensor x, int dim, int blocks, int ranks) -> Tensor")
_library.define("unfold(Tensor x, int dim, int blocks, int ranks) -> Tensor")
_library.define(
    "context_attention(Tensor query, Tensor key, Tensor value, float? scale, int ranks, str axis) -> Tensor"
)
_library.define(
    "attend(Tensor query, Tensor keys, Tensor values, float? scale, int ranks, str axis) -> (Tensor, Tensor)"
)
_library.define(
    "attend_backward(Tensor gradient, Tensor query, Tensor keys, Tensor values, Tensor result, Tensor sums, "
    "float? scale, int ranks, str axis) -> (Tensor, Tensor, Tensor)"
)

FOLD = torch.ops.graphopt.fold.default
UNFOLD = torch.ops.graphopt.unfold.default
CONTEXT_ATTENTION = torch.ops.graphopt.context_attention.default
ATTEND = torch.ops.graphopt.attend.default
ATTEND_BACKWARD = torch.ops.graphopt.attend_backward.default

OF_RANK = moves.OF_RANK | {ATTEND, ATTEND_BACKWARD}
COMMUNICATING = moves.MOVES | {CONTEXT_ATTENTION}


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        ranks: int,
        axis: str,
    ) -> torch.Tensor:
        result, sums = ATTEND(query, _gathered(key, ranks, axis), _gathered(value, ranks, axis), scale, ranks, axis)
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.more = scale, ranks, axis
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, result, sums = ctx.saved_tensors
        scale, ranks, axis = ctx.more
        keys, values = (_gathered(each, ranks, axis) for each in (key, value))
        of_query, of_keys, of_values = ATTEND_BACKWARD(gradient, query, keys, values, result, sums, scale, ranks, axis)
        return of_query, _scattered(of_keys, ranks, axis), _scattered(of_values, ranks, axis), None, None, None


def _gathered(x: torch.Tensor, ranks: int, axis: str) -> torch.Tensor:
    """The ranks' tensors end to end in the first dimension: as they come, for the kernels find their chunks."""
    gathered: torch.Tensor = functional.wait_tensor(functional.all_gather_into_tensor(x.contiguous(), ranks, axis))
    return gathered


def _scattered(x: torch.Tensor, ranks: int, axis: str) -> torch.Tensor:
    part: torch.Tensor = functional.wait_tensor(functional.reduce_scatter_tensor(x, "sum", ranks, axis))
    return part


def _fold(x: torch.Tensor, dim: int, blocks: int, ranks: int) -> torch.Tensor:
    """Of each block chunks 0, 2n-1, 1, 2n-2 and so on. Divides by 2 * blocks * ranks."""
    chunks = x.unflatten(dim, (blocks, 2, ranks, x.shape[dim] // (2 * blocks * ranks)))
    first, last = chunks.unbind(dim + 1)
    return torch.stack([first, last.flip(dim + 1)], dim + 2).flatten(dim, dim + 3)


def _unfold(x: torch.Tensor, dim: int, blocks: int, ranks: int) -> torch.Tensor:
    chunks = x.unflatten(dim, (blocks, ranks, 2, x.shape[dim] // (2 * blocks * ranks)))
    first, last = chunks.unbind(dim + 2)
    return torch.stack([first, last.flip(dim + 1)], dim + 1).flatten(dim, dim + 3)


def _fake_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, ranks: int, axis: str
) -> torch.Tensor:
    return query.new_empty(query.shape)


def _fake_attend(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=wide)


def _fake_attend_backward(
    gradient: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


_library.impl("fold", _fold, "CompositeImplicitAutograd")
_library.impl("unfold", _unfold, "CompositeImplicitAutograd")
_library.impl("context_attention", _ContextAttention.apply, "Autograd")
for _name, _fake in (
    ("context_attention", _fake_attention),
    ("attend", _fake_attend),
    ("attend_backward", _fake_attend_backward),
):
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
