"""Rotary embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys in operators of torch.

q: [batch, heads, positions, width], k: [batch, key heads, positions, width], of any strides, which results share; cos
and sin: [batch or 1, positions, half]. Of each row, pair i of the first 2 * half elements is turned by its angle:

    (a, b) -> (a * cos - b * sin, b * cos + a * sin)

and the rest is left as it is. Pairs are (i, i + half), as in Llama, or (2i, 2i + 1) if `interleaved`, as in GPT-J. The
inverse turns the other way: that is the derivative too, where angles are constants.
"""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    return _turned(q, cos, sin, interleaved, inverse), _turned(k, cos, sin, interleaved, inverse)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    cos, sin = (angle.to(wide).unsqueeze(1) for angle in (cos, -sin if inverse else sin))
    turned = x[..., : 2 * half].to(wide)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.split(half, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.empty_like(x)
    y[..., : 2 * half] = joined
    y[..., 2 * half :] = x[..., 2 * half :]
    return y
