"""RMSNorm as it is spelled out, LayerNorm, and both of a sum, which is read elsewhere as well.

One summand may be what dropout leaves. Its mask is then drawn where the dropout was, by torch as before, and saved;
what applies it is pure.

A sum that the next repeated layer normalizes stays apart: rematerialization saves what goes from one layer to the next,
and that would be two tensors where it is one.
"""

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx

from graphopt._torch import argument
from graphopt.dimensions.notation import same_shape
from graphopt.ir import facts_of
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import (
    Found,
    Pattern,
    bind,
    call,
    casts,
    constant,
    dtype_of,
    either,
    exactly,
    named,
    number,
    packet_of,
    reshape_source,
    uncast,
)
from graphopt.triton_kernels.norms.dropout import DROPOUT_MASK
from graphopt.triton_kernels.norms.op import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, NORMS, RMS_NORM

aten = torch.ops.aten


def _rms() -> Pattern:
    """x / sqrt(mean(x^2) + epsilon), times weight or offset + weight, or nothing."""
    x, weight = bind("x"), bind("weight")
    square = either(call(aten.pow, x, exactly(2)), call(aten.square, x), call(aten.mul, x, x))
    mean = call(aten.mean, square, constant("dims"), exactly(True))
    variance = call(aten.add, mean, number("epsilon"))
    root = either(call(aten.sqrt, variance), call(aten.pow, variance, exactly(0.5)))
    inverse = either(call(aten.rsqrt, variance), call(aten.pow, variance, exactly(-0.5)), call(aten.reciprocal, root))
    normalized = named("normalized", either(call(aten.mul, x, inverse), call(aten.div, x, root)))
    return either(
        call(aten.mul, normalized, call(aten.add, weight, number("offset"))),
        call(aten.mul, normalized, weight),
        normalized,
    )


def _layer(value: Any, found: Found) -> Iterator[Found]:
    """A call of layer norm over the last dimension."""
    node = uncast(value)
    if packet_of(node) is not aten.layer_norm:
        return
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    x, shape, weight, bias, epsilon = (argument(node.target, name, node.args, node.kwargs) for name in names)
    if len(shape) == 1:
        for name, given in (("weight", weight), ("bias", bias), ("epsilon", epsilon)):
            found = found.binding(name, given) if given is not None else found
        yield from bind("x")(x, found.through(*casts(value), node))


def _fits_rms(site: Site) -> bool:
    x, dims = site.value("x"), site["dims"]
    is_last = isinstance(dims, (list, tuple)) and list(dims) in ([-1], [x.dim() - 1])
    return is_last and _is_as_wide(site["normalized"], x.dtype) and _fits(site)


def _fits(site: Site) -> bool:
    x = site.value("x")
    rows = [site.value(name) for name in ("weight", "bias") if site[name] is not None]
    are_rows = all(same_shape(row.shape, x.shape[-1:]) and row.dtype in (x.dtype, torch.float32) for row in rows)
    # What is rounded on the way is rounded last.
    return are_rows and same_shape(site.result.shape, x.shape) and _is_as_wide(uncast(site.root), site.result.dtype)


def _is_as_wide(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether all numbers of a dtype are exact in that of a value."""
    return torch.promote_types(dtype_of(node), dtype) == dtype_of(node)


def _total(site: Site) -> fx.Node | None:
    """The sum that is normalized, perhaps reshaped, if it is one of two tensors that are alike."""
    node: fx.Node | None = site["x"]
    if node is not None and (source := reshape_source(node)) is not None:
        node = source
    if node is None or packet_of(node) is not aten.add or len(node.args) != 2 or node.kwargs:
        return None
    one, other = (each.meta["val"] if isinstance(each, fx.Node) else None for each in node.args)
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.dtype != other.dtype:
        return None
    return node if same_shape(one.shape, other.shape) else None


def _sums(site: Site) -> bool:
    """Whether there is such a sum, in the same layer, behind weight and bias."""
    total = _total(site)
    if total is None:
        return False
    one, other = facts_of(total), facts_of(site.root)
    rows = [site[name] for name in ("weight", "bias") if site[name] is not None]
    are_given = all(site.place.get(row, -1) < site.place[total] for row in rows)
    return are_given and (one.layer, one.checkpoint) == (other.layer, other.checkpoint)


def _dropped(total: fx.Node) -> fx.Node | None:
    """A dropout of which the sum alone reads the result, and nothing the mask; None if no summand is one."""
    place = facts_of(total)
    for item in total.all_input_nodes if len(total.all_input_nodes) == 2 else ():
        if item.target is not operator.getitem or item.args[1] != 0:
            continue
        (dropout,) = item.all_input_nodes
        if packet_of(dropout) is not aten.native_dropout or len(item.users) != 1 or len(dropout.users) != 1:
            continue
        facts = facts_of(dropout)
        if dropout.args[2] and (facts.layer, facts.checkpoint) == (place.layer, place.checkpoint):
            return dropout
    return None


def _options(site: Site) -> tuple[Any, ...]:
    """Weight and numbers, as operators of RMSNorm take them."""
    rounds_first = dtype_of(site["normalized"]) == dtype_of(site["x"])
    return site["weight"], site["epsilon"], site["offset"] or 0.0, rounds_first


def _cast(site: Site) -> dict[str, torch.dtype]:
    """The dtype of the result, where it is not that of x."""
    return {} if site.result.dtype == dtype_of(site["x"]) else {"dtype": site.result.dtype}


def _write_alone(writer: Writer, norm: Any, options: tuple[Any, ...]) -> Replacements:
    site = writer.site
    with writer.before(site.root):
        return {site.root: writer.item(writer.call(norm, site["x"], *options, **_cast(site)), 0)}


def _write_sum(writer: Writer, norm: Any, options: tuple[Any, ...]) -> Replacements:
    site = writer.site
    total = _total(site)
    assert total is not None
    summands: list[Any] = list(total.args)
    extra: dict[str, Any] = dict(_cast(site))
    if (dropout := _dropped(total)) is not None:
        (item,) = dropout.users
        x, p, _ = cast(tuple[fx.Node, float, bool], dropout.args)
        with writer.before(dropout):
            mask = writer.call(DROPOUT_MASK, x, p)
        summands = [x, next(each for each in summands if each is not item)]
        extra |= {"mask": mask, "scale": 0.0 if p == 1 else 1 / (1 - p)}
        writer.drop(total, item, dropout)
    with writer.before(total):
        normed = writer.call(norm, *summands, *options, **extra)
        y, whole = writer.item(normed, 0), writer.item(normed, 1)
    with writer.before(site.root):
        return {site.root: writer.like(y, site["x"]), total: whole}


def _layer_options(site: Site) -> tuple[Any, ...]:
    """Weight, bias and epsilon, as operators of LayerNorm take them."""
    return site["weight"], site["bias"], site["epsilon"]


FUSIONS = (
    Fusion(
        "add_rms_norm",
        NORMS,
        _rms(),
        of="x",
        fits=lambda site: _fits_rms(site) and _sums(site),
        write=lambda writer: _write_sum(writer, ADD_RMS_NORM, _options(writer.site)),
    ),
    Fusion(
        "rms_norm",
        NORMS,
        _rms(),
        of="x",
        fits=_fits_rms,
        write=lambda writer: _write_alone(writer, RMS_NORM, _options(writer.site)),
    ),
    Fusion(
        "add_layer_norm",
        NORMS,
        _layer,
        of="x",
        fits=lambda site: _fits(site) and _sums(site),
        write=lambda writer: _write_sum(writer, ADD_LAYER_NORM, _layer_options(writer.site)),
    ),
    Fusion(
        "layer_norm",
        NORMS,
        _layer,
        of="x",
        fits=_fits,
        write=lambda writer: _write_alone(writer, LAYER_NORM, _layer_options(writer.site)),
    ),
)
