"""SwiGLU and GeGLU, and GELU behind a bias or spelled out.

    gelu         x * (1 + erf(x / sqrt(2))) / 2                                       Hendrycks and Gimpel 2016
    gelu_tanh    x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2              arXiv:1606.08415

A bias is taken out of the product of matrices before, as its gradient is then summed along with the activation's.
"""

import math

import torch
from torch import fx

from graphopt.dimensions.notation import same_shape
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import (
    Pattern,
    bind,
    call,
    dtype_of,
    either,
    exactly,
    named,
    packet_of,
    product,
    reshape_source,
    reshaped,
    stating,
)
from graphopt.triton_kernels.activations.op import BIAS_ACTIVATION, FAMILY, GATED

aten = torch.ops.aten


def _activated(name: str) -> Pattern:
    """An activation of what `name` then stands for; `activation` says which, `spelled` whether in several calls."""
    x = bind(name)
    cubic = call(aten.add, x, product(x, x, x, scale=0.044715))
    quadratic = call(aten.add, product(x, x, scale=0.044715), exactly(1))
    scale = math.sqrt(2 / math.pi)
    angle = either(product(cubic, scale=scale), product(x, quadratic, scale=scale))
    by_tanh = call(aten.add, call(aten.tanh, angle), exactly(1))
    by_erf = call(aten.add, call(aten.erf, product(x, scale=math.sqrt(0.5))), exactly(1))
    calls = (
        stating("activation", "silu", call(aten.silu, x)),
        stating("activation", "gelu", either(call(aten.gelu, x), call(aten.gelu, x, approximate=exactly("none")))),
        stating("activation", "gelu_tanh", call(aten.gelu, x, approximate=exactly("tanh"))),
    )
    spelled = (
        stating("activation", "silu", product(x, call(aten.sigmoid, x))),
        stating("activation", "gelu_tanh", product(x, by_tanh, scale=0.5)),
        stating("activation", "gelu", product(x, by_erf, scale=0.5)),
    )
    return either(stating("spelled", False, either(*calls)), stating("spelled", True, either(*spelled)))


def _fits_gated(site: Site) -> bool:
    gate, up = site.value("gate"), site.value("up")
    is_alike = same_shape(site.value("activated").shape, up.shape)
    return is_alike and gate.dtype == up.dtype == site.result.dtype


def _write_gated(writer: Writer) -> Replacements:
    site = writer.site
    with writer.before(site.root):
        gate = writer.like(site["gate"], site["activated"])
        return {site.root: writer.call(GATED, gate, site["up"], site["activation"])}


def _fits_biased(site: Site) -> bool:
    x = site.value("x")
    is_alike = same_shape(x.shape, site.result.shape) and x.dtype == site.result.dtype and x.dim() > 0
    return is_alike and (site["spelled"] or _biased(site) is not None) and site["activation"] != "silu"


def _biased(site: Site) -> fx.Node | None:
    """The product of matrices with a bias that the activation alone reads, if there is one, perhaps reshaped."""
    x: fx.Node = site["x"]
    if not site.is_inside(x):
        return None
    source = reshape_source(x)
    if source is not None:
        x, is_alone = source, len(source.users) == 1
        if not is_alone:
            return None
    bias = _bias_of(x)
    is_row = bias is not None and same_shape(bias.meta["val"].shape, x.meta["val"].shape[-1:])
    return x if is_row and bias is not None and dtype_of(bias) in (dtype_of(x), torch.float32) else None


def _bias_of(node: fx.Node) -> fx.Node | None:
    if packet_of(node) is aten.linear and len(node.args) == 3 and isinstance(node.args[2], fx.Node):
        return node.args[2]
    if packet_of(node) is aten.addmm and len(node.args) == 3 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def _write_biased(writer: Writer) -> Replacements:
    site = writer.site
    x, bias = site["x"], None
    biased = _biased(site)
    with writer.before(site.root):
        if biased is not None:
            bias = _bias_of(biased)
            if packet_of(biased) is aten.linear:
                x = writer.call(aten.linear.default, *biased.args[:2])
            else:
                x = writer.call(aten.mm.default, *biased.args[1:])
            x = writer.like(x, site["x"])
        return {site.root: writer.call(BIAS_ACTIVATION, x, bias, site["activation"])}


FUSIONS = (
    Fusion(
        "gated",
        FAMILY,
        call(aten.mul, named("activated", reshaped(_activated("gate"))), bind("up")),
        of="gate",
        fits=_fits_gated,
        write=_write_gated,
    ),
    Fusion("bias_activation", FAMILY, _activated("x"), of="x", fits=_fits_biased, write=_write_biased),
)
