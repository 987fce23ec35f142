"""Cross-entropy of class indices, and with the linear layer before it where nothing else reads the logits.

A model that returns its logits, as those of Transformers do, reads them elsewhere.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt._torch import argument
from graphopt.dimensions.notation import same_shape
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import (
    Found,
    cast_source,
    dtype_of,
    packet_of,
    reshape_source,
)
from graphopt.triton_kernels.cross_entropy.linear import LINEAR_CROSS_ENTROPY
from graphopt.triton_kernels.cross_entropy.op import CROSS_ENTROPY, FAMILY

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # of `torch.nn.functional`'s reductions; 0 is none


def _loss(value: Any, found: Found) -> Iterator[Found]:
    """A loss of classes that have no weights."""
    if packet_of(value) is not aten.cross_entropy_loss:
        return
    names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    logits, targets, weight, *options = (argument(value.target, name, value.args, value.kwargs) for name in names)
    if weight is not None:
        return
    bound = ("logits", "targets", "reduction", "ignore_index", "smoothing")
    for name, given in zip(bound, (logits, targets, *options), strict=True):
        found = found.binding(name, given)
    yield found.through(value)


def _fits(site: Site) -> bool:
    logits, targets = site.value("logits"), site.value("targets")
    return logits.dim() == 2 and same_shape(targets.shape, logits.shape[:1]) and targets.dtype == torch.int64


def _product(site: Site) -> tuple[fx.Node, list[fx.Node]] | None:
    """The linear layer without bias that gives the logits, and the calls from it to them; None if others read any."""
    behind: list[fx.Node] = []
    node: fx.Node | None = site["logits"]
    while node is not None:
        behind.append(node)
        if len(node.users) != 1:
            return None
        if packet_of(node) is aten.linear:
            return (node, behind) if len(node.args) == 2 and not node.kwargs else None
        node = reshape_source(node) or cast_source(node)
    return None


def _fits_linear(site: Site) -> bool:
    return _fits(site) and site["reduction"] in (_MEAN, _SUM) and _product(site) is not None


def _narrow(logits: fx.Node) -> fx.Node:
    """Logits before they are cast to a wider dtype, and viewed otherwise."""
    found = node = logits
    while (source := reshape_source(node) or cast_source(node)) is not None:
        if torch.promote_types(dtype_of(source), dtype_of(node)) != dtype_of(node):
            break
        found, node = (source if dtype_of(source) != dtype_of(node) else found), source
    return found


def _write_loss(writer: Writer) -> Replacements:
    site = writer.site
    with writer.before(site.root):
        options = (site["ignore_index"], site["smoothing"], 0.0)
        logits = writer.like(_narrow(site["logits"]), site["logits"])
        losses = writer.item(writer.call(CROSS_ENTROPY, logits, site["targets"], *options), 0)
        if site["reduction"] in (_MEAN, _SUM):
            losses = writer.call(aten.sum.default, losses)
        if site["reduction"] == _MEAN:
            losses = writer.call(aten.div.Tensor, losses, _count(writer))
        return {site.root: writer.cast(losses, site.result.dtype)}


def _write_linear(writer: Writer) -> Replacements:
    site = writer.site
    found = _product(site)
    assert found is not None
    hidden, weight = found[0].args
    with writer.before(site.root):
        rows = writer.call(aten.reshape.default, hidden, [-1, hidden.meta["val"].shape[-1]])  # type: ignore[union-attr]
        exact = torch.promote_types(rows.meta["val"].dtype, torch.float32)
        scales = writer.call(aten.ones_like.default, site["targets"], dtype=exact)
        if site["reduction"] == _MEAN:
            scales = writer.call(aten.div.Tensor, scales, _count(writer))
        options = (site["ignore_index"], site["smoothing"], 0.0, hidden in site.varying, weight in site.varying)
        total = writer.item(writer.call(LINEAR_CROSS_ENTROPY, rows, weight, site["targets"], scales, *options), 0)
        return {site.root: writer.cast(total, site.result.dtype)}


def _count(writer: Writer) -> fx.Node:
    """How many tokens are not ignored."""
    kept = writer.call(aten.ne.Scalar, writer.site["targets"], writer.site["ignore_index"])
    return writer.call(aten.sum.default, kept)


FUSIONS = (
    Fusion(
        "linear_cross_entropy",
        FAMILY,
        _loss,
        of="logits",
        fits=_fits_linear,
        write=_write_linear,
    ),
    Fusion("cross_entropy", FAMILY, _loss, of="logits", fits=_fits, write=_write_loss),
)
