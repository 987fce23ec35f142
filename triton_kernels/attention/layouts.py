"""Layouts of block-sparse attention: which blocks of keys a block of queries reads, bool [heads or 1, blocks, blocks].

    local         a window of blocks                                   Beltagy et al. 2020, arXiv:2004.05150
    strided       the last few blocks, and every n-th before           Child et al. 2019, arXiv:1904.10509
    fixed         blocks of blocks, and the last of each of these      the same
    variable      blocks of blocks of several sizes, some for all, some at random
    longformer    a window, and some blocks that read all and are read by all    Beltagy et al. 2020
    bigbird       a window, the first blocks for all, some at random   Zaheer et al. 2020, arXiv:2007.14062

The patterns are those that DeepSpeed's sparse attention configures (deepspeed.ai/tutorials/sparse-attention). Where
`causal`, no block behind that of a query is read; which elements of its own block are is up to attention. ValueError
names an argument that does not fit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """A layout as kernels walk it: int32, for each head and row the columns that it reads, one behind another.

    offsets: [heads, rows + 1], where those of each row begin in `blocks`, and where the last end.
    """

    offsets: Tensor
    blocks: Tensor


def lists(layout: Tensor) -> Lists:
    """The columns of each row of a layout; of ``layout.mT`` the rows of each column."""
    if layout.dim() != 3 or layout.dtype != torch.bool:
        raise ValueError(f"layout is {layout.dtype} {list(layout.shape)}, not torch.bool [heads or 1, rows, columns]")
    heads, rows, _ = layout.shape
    ends = layout.sum(-1).flatten().cumsum(0)
    begins = torch.cat([ends.new_zeros(1), ends])
    at = torch.arange(heads, device=layout.device)[:, None] * rows + torch.arange(rows + 1, device=layout.device)
    return Lists(begins[at].to(torch.int32), layout.nonzero()[:, 2].to(torch.int32))


def local(blocks: int, window: int, *, causal: bool = False) -> Tensor:
    """window: blocks on a side, with the own."""
    _check_positive(blocks=blocks, window=window)
    return _finished(_apart(blocks).abs() < window, causal)


def strided(blocks: int, window: int, stride: int, *, causal: bool = False) -> Tensor:
    """window: as of `local`. stride: from each block that is read besides to the next, counted from the own."""
    _check_positive(blocks=blocks, window=window, stride=stride)
    apart = _apart(blocks)
    return _finished((apart.abs() < window) | (apart % stride == 0), causal)


def fixed(
    blocks: int,
    window: int,
    *,
    summaries: int = 1,
    patterns: int = 1,
    heads: int = 1,
    read_all: bool = False,
    causal: bool = False,
) -> Tensor:
    """Windows side by side; of each the last `summaries` blocks are read by all blocks.

    patterns: how many heads in turn take other summaries, the last ones, those before, and so on. read_all: the blocks
    of summaries read all others too.
    """
    _check_positive(blocks=blocks, window=window, summaries=summaries, patterns=patterns, heads=heads)
    if summaries * patterns > window:
        raise ValueError(f"summaries is {summaries}, but {patterns} patterns of so many are more than window, {window}")
    at = torch.arange(blocks)
    within = at[:, None] // window == at // window
    layouts = []
    for head in range(heads):
        end = window - (head % patterns) * summaries
        summary = (at % window >= end - summaries) & (at % window < end)
        whole = within | summary
        layouts.append(whole | summary[:, None] if read_all else whole)
    return _finished(torch.stack(layouts), causal)


def variable(
    blocks: int,
    windows: Sequence[int],
    *,
    shared: Sequence[int] = (0,),
    random: int = 0,
    heads: int = 1,
    seed: int = 0,
    read_all: bool = False,
    causal: bool = False,
) -> Tensor:
    """Windows of these sizes side by side, the last repeated; blocks `shared` are read by all.

    random: blocks that each reads besides, others for each head. read_all: shared blocks read all others too.
    """
    if not windows:
        raise ValueError("windows is empty: give the size of at least one")
    for window in windows:
        _check_positive(blocks=blocks, windows=window, heads=heads)
    sizes = [*windows, *[windows[-1]] * (blocks // windows[-1] + 1)]
    of_block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:blocks]
    whole = of_block[:, None] == of_block
    is_shared = _chosen(blocks, "shared", shared)
    whole = whole | is_shared | (is_shared[:, None] & read_all)
    return _finished(whole | _random(heads, blocks, random, seed, causal), causal)


def longformer(blocks: int, window: int, *, shared: Sequence[int] = (0,), causal: bool = False) -> Tensor:
    """window: as of `local`. shared: blocks that read all others and are read by them."""
    _check_positive(blocks=blocks, window=window)
    is_shared = _chosen(blocks, "shared", shared)
    return _finished((_apart(blocks).abs() < window) | is_shared | is_shared[:, None], causal)


def bigbird(
    blocks: int,
    window: int,
    *,
    shared: int = 1,
    random: int = 1,
    heads: int = 1,
    seed: int = 0,
    causal: bool = False,
) -> Tensor:
    """As `longformer` where the first `shared` blocks are shared; each reads `random` besides, others for each head."""
    _check_positive(heads=heads)
    whole = longformer(blocks, window, shared=range(shared), causal=causal)
    return _finished(whole | _random(heads, blocks, random, seed, causal), causal)


def _apart(blocks: int) -> Tensor:
    """How far each block of queries is behind each of keys."""
    at = torch.arange(blocks)
    return at[:, None] - at


def _chosen(blocks: int, name: str, indices: Sequence[int]) -> Tensor:
    wrong = [index for index in indices if not 0 <= index < blocks]
    if wrong:
        raise ValueError(f"{name} has {wrong[0]}, which is no block, from 0 to {blocks - 1}")
    chosen = torch.zeros(blocks, dtype=torch.bool)
    chosen[list(indices)] = True
    return chosen


def _random(heads: int, blocks: int, count: int, seed: int, causal: bool) -> Tensor:
    """So many blocks for each row, drawn evenly; where `causal`, of those not behind it, as far as there are."""
    if not 0 <= count <= blocks:
        raise ValueError(f"random is {count}, not from 0 to {blocks}, the number of blocks")
    draws = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    if causal:
        draws = draws.tril()  # what is behind comes last, and is left out at the end
    chosen = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    return chosen.scatter_(-1, draws.argsort(-1, descending=True)[..., :count], True)


def _finished(layout: Tensor, causal: bool) -> Tensor:
    layout = layout if layout.dim() == 3 else layout[None]
    return layout.tril() if causal else layout.contiguous()


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, not at least 1")
