"""Attention by torch with a mask that is a sliding window, whatever it is made of.

Models compare positions to make such a mask. One that depends on no input is computed here, and compared with that of
each window: then pairs which it excludes are skipped.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt._torch import argument
from graphopt.ir.effects import Effect, effect_of
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import Found, packet_of
from graphopt.triton_kernels.attention.masks import intervals, reach
from graphopt.triton_kernels.attention.op import ATTENTION, FAMILY

aten = torch.ops.aten
_CPU = torch.device("cpu")
_MOST = 1 << 28  # elements of a mask that is computed
_UNSET = frozenset({aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided})


def _windowed(value: Any, found: Found) -> Iterator[Found]:
    """Attention of a causal window; `window` stands for its keys."""
    if packet_of(value) is not aten.scaled_dot_product_attention:
        return
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, (argument(value.target, name, value.args, value.kwargs) for name in names), strict=True))
    if not isinstance(given["attn_mask"], fx.Node) or given["dropout_p"] or given["is_causal"]:
        return
    mask = _known(given["attn_mask"])
    window = None if mask is None else window_of(mask)
    if window is not None:
        for name in ("query", "key", "value", "scale"):
            found = found.binding(name, given[name])
        yield found.binding("window", window).through(value)


def _known(node: fx.Node) -> torch.Tensor | None:
    """What a call gives that depends on no input and is not drawn; None where it is not known."""
    needed: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop()
        value = each.meta.get("val")
        if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
            return None
        if packet_of(each) in (None, *_UNSET) or effect_of(each) is not Effect.PURE or value.numel() > _MOST:
            return None
        needed[each] = None
        waiting += [source for source in each.all_input_nodes if source not in needed]
    values: dict[fx.Node, torch.Tensor] = {}
    for each in node.graph.nodes:
        if each in needed:
            args, kwargs = fx.map_arg((each.args, each.kwargs), values.__getitem__)
            values[each] = each.target(*args, **(kwargs | {"device": _CPU} if "device" in kwargs else kwargs))
    return values[node]


def window_of(mask: torch.Tensor) -> int | None:
    """The causal window, in keys, that a mask of bools or of addends leaves; None if it is none, or is all there is."""
    if mask.dim() < 2 or not mask.numel():
        return None
    pages = mask.reshape(-1, *mask.shape[-2:])
    if not (pages == pages[:1]).all():
        return None
    if mask.dtype == torch.bool:
        read = pages[0]
    else:
        read = pages[0] == 0
        if not (read | (pages[0] <= torch.finfo(mask.dtype).min)).all():
            return None
    queries, keys = read.shape
    window = int(read[-1].sum())
    first, last = intervals(queries, keys, None, None, reach(True, window), _CPU)
    key = torch.arange(keys)
    is_window = torch.equal(read, (key >= first[:, None]) & (key < last[:, None])) and bool((last > first).all())
    return window if is_window and window < keys else None


def _fits(site: Site) -> bool:
    q, k, v = (site.value(name) for name in ("query", "key", "value"))
    return q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]


def _write(writer: Writer) -> Replacements:
    site = writer.site
    with writer.before(site.root):
        scale = site.value("query").shape[-1] ** -0.5 if site["scale"] is None else site["scale"]
        tensors = (site[name] for name in ("query", "key", "value"))
        made = writer.call(ATTENTION, *tensors, None, None, True, site["window"], scale)
        return {site.root: writer.item(made, 0)}


FUSIONS = (Fusion("attention", FAMILY, _windowed, of="query", fits=_fits, write=_write),)
