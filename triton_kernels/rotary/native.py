"""Rotary embedding by `graphopt.cuda_ext`; the function has the arguments and results of that in `reference`."""

import torch
from torch import Tensor

from graphopt.cuda_ext import rotary as native


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, apart: bool = False
) -> tuple[Tensor, Tensor]:
    cos, sin = (angle.to(q.dtype if cos.dtype == sin.dtype == q.dtype else torch.float32) for angle in (cos, sin))
    own, other = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    of_q, of_k = native.rotary(own, other, cos.contiguous(), sin.contiguous(), interleaved, inverse, apart)
    return _laid_as(q, of_q), _laid_as(k, of_k)


def _laid_as(x: Tensor, result: Tensor) -> Tensor:
    return result if x.stride(-1) == 1 else torch.empty_like(x).copy_(result)
