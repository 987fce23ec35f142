"""Softmax with what comes before and behind: a scale, a mask that is added, casts. As eager attention spells it out."""

import torch

from graphopt.dimensions.notation import is_one, same_shape, same_size
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import bind, call, constant, either, number
from graphopt.triton_kernels.softmax.op import FAMILY, SOFTMAX

aten = torch.ops.aten
_X = bind("x")
_SCALED = either(call(aten.mul, _X, number("scale")), call(aten.div, _X, number("divisor")))
_SCORES = either(call(aten.add, either(_SCALED, _X), bind("mask")), _SCALED, _X)
_SOFTMAX = either(
    call(aten.softmax, _SCORES, constant("dim")),
    call(aten.softmax, _SCORES, constant("dim"), constant("dtype")),
)


def _fits(site: Site) -> bool:
    """More than one operator, over the last dimension; the mask of a shape that broadcasts."""
    x, result, mask = site.value("x"), site.result, site["mask"]
    is_last = site["dim"] in (-1, x.dim() - 1)
    does_more = mask is not None or site["scale"] or site["divisor"] or x.dtype != result.dtype
    return is_last and bool(does_more) and same_shape(x.shape, result.shape) and (mask is None or _broadcasts(site))


def _broadcasts(site: Site) -> bool:
    mask, x = site.value("mask"), site.value("x")
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    is_smaller = mask.dim() <= x.dim() and all(is_one(one) or same_size(one, other) for one, other in sizes)
    return mask.is_floating_point() and mask.device == x.device and is_smaller


def _write(writer: Writer) -> Replacements:
    site = writer.site
    scale = 1 / site["divisor"] if site["divisor"] else site["scale"]
    with writer.before(site.root):
        options = (1.0 if scale is None else scale, False, site.result.dtype)
        return {site.root: writer.call(SOFTMAX, site["x"], site["mask"], *options)}


FUSIONS = (Fusion("softmax", FAMILY, _SOFTMAX, of="x", fits=_fits, write=_write),)
