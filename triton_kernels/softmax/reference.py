"""Softmax of scaled and masked scores in operators of torch, in float32 or, of float64, in float64.

    y = softmax(scale * x + mask)    over the last dimension of x, [..., rows, columns]

mask: of a shape that broadcasts to that of x; floating, which is added, or bool, True where an element counts. causal:
in row i the columns up to i + columns - rows count, so that the last row has all. A row in which none counts, or all
are -inf, gives zeros. y is of `dtype`, that of x by default; its derivative is found from y.
"""

import torch
from torch import Tensor


def softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool, dtype: torch.dtype | None) -> Tensor:
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        rows, columns = x.shape[-2:]
        behind = torch.ones(rows, columns, dtype=torch.bool, device=x.device).triu(columns - rows + 1)
        scores = scores.masked_fill(behind, -torch.inf)
    has_none = (scores == -torch.inf).all(-1, keepdim=True)
    y = scores.softmax(-1).masked_fill(has_none, 0)
    return y.to(x.dtype if dtype is None else dtype).contiguous()


def softmax_backward(gradient: Tensor, y: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The gradient of x, which is of `dtype`."""
    wide = torch.promote_types(y.dtype, torch.float32)
    along = gradient.to(wide) * y
    of_scores = along - y * along.sum(-1, keepdim=True)
    return (of_scores * scale).to(dtype).contiguous()
