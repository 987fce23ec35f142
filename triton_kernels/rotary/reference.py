"""Rotary embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys in operators of torch.

q: [batch, heads, positions, width], k: [batch, key heads, positions, width], of any strides, which results share; cos
and sin: [batch or 1, positions, half]. Of each row, pair i of the first 2 * half elements is turned by its angle:

    (a, b) -> (a * cos - b * sin, b * cos + a * sin)

and the rest is left as it is. Pairs are (i, i + half), as in Llama, or (2i, 2i + 1) if `interleaved`, as in GPT-J. The
inverse turns the other way: that is the derivative too, where angles are constants. If results lie `apart`, those of
pairs (2i, 2i + 1) are put at (i, i + half), as in DeepSeek, and the inverse puts them back.
"""

from graphopt.cuda_ext.reference import rotary

__all__ = ["rotary"]
