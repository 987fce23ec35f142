"""Cross-entropy of logits of which each rank has some classes, as `split` spells it, and the linear layer before it.

Of each token it sums three numbers over the ranks, behind the largest logit of all. Here each rank finds its own with
one look at its logits, or without holding them; what goes between ranks stays.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.ir.moves import MAXIMUM
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import (
    Found,
    Pattern,
    bind,
    call,
    cast_source,
    constant,
    exactly,
    packet_of,
    reshape_source,
    widened_source,
)
from graphopt.triton_kernels.cross_entropy.op import FAMILY
from graphopt.triton_kernels.cross_entropy.part import CROSS_ENTROPY_PART, ELSEWHERE, LINEAR_CROSS_ENTROPY_PART

aten = torch.ops.aten


def _summands() -> tuple[Pattern, ...]:
    """The sum of exponentials, what the largest logit is above the target's, and if labels are smoothed above all."""
    logits = bind("logits")
    largest = call(aten.amax, call(aten.detach, logits), constant("dims"), exactly(True))
    above = call(aten.sub, logits, call(MAXIMUM.overloadpacket, largest, constant("axis")))
    loss = call(aten.nll_loss_nd, above, bind("targets"), exactly(None), exactly(0), exactly(ELSEWHERE))
    return call(aten.sum, call(aten.exp, above), constant("dims")), loss, call(aten.sum, above, constant("dims"))


_SUMMANDS = _summands()


def _stacked(value: Any, found: Found) -> Iterator[Found]:
    if packet_of(value) is aten.stack and len(value.args) == 1 and len(value.args[0]) in (2, 3):
        ways = [found.through(value)]
        for pattern, summand in zip(_SUMMANDS, value.args[0], strict=False):
            ways = [each for way in ways for each in pattern(summand, way)]
        yield from ways


def _fits(site: Site) -> bool:
    logits, targets = site.value("logits"), site.value("targets")
    return logits.dim() == 2 and list(site["dims"]) == [1] and targets.dtype == torch.int64


def _product(site: Site) -> fx.Node | None:
    """The linear layer without bias that gives the logits, if nothing else reads them."""
    node: fx.Node | None = site["logits"]
    while node is not None and _feeds_only(node, site):
        if packet_of(node) is aten.linear:
            return node if len(node.args) == 2 and not node.kwargs else None
        node = reshape_source(node) or widened_source(node)
    return None


def _feeds_only(node: fx.Node, site: Site) -> bool:
    """Whether all that reads a node, or a cast or view of it, is the site."""
    return all(
        user in site.found.inner
        or ((reshape_source(user) is node or cast_source(user) is node) and _feeds_only(user, site))
        for user in node.users
    )


def _write(writer: Writer) -> Replacements:
    site = writer.site
    with writer.before(site.root):
        return _summed(writer, CROSS_ENTROPY_PART, site["logits"])


def _write_linear(writer: Writer) -> Replacements:
    site = writer.site
    product = _product(site)
    assert product is not None
    hidden, weight = product.args
    with writer.before(site.root):
        rows = writer.call(aten.reshape.default, hidden, [-1, hidden.meta["val"].shape[-1]])  # type: ignore[union-attr]
        return _summed(writer, LINEAR_CROSS_ENTROPY_PART, rows, weight)


def _summed(writer: Writer, operator: Any, *operands: Any) -> Replacements:
    """The summands that the ranks have, from a part of the classes."""
    site, call = writer.site, writer.call
    has_totals = len(site.root.args[0]) == 3  # type: ignore[arg-type]
    part = call(operator, *operands, site["targets"], has_totals)
    largest, powers, chosen = (writer.item(part, index) for index in range(3))
    highest = call(MAXIMUM, largest, site["axis"])
    exponentials = call(aten.mul.Tensor, powers, call(aten.exp.default, call(aten.sub.Tensor, largest, highest)))
    is_elsewhere = call(aten.eq.Scalar, site["targets"], ELSEWHERE)
    less_logit = call(aten.masked_fill.Scalar, call(aten.sub.Tensor, highest, chosen), is_elsewhere, 0)
    summands = [exponentials, less_logit]
    if has_totals:
        classes = site.value("logits").shape[1]
        summands.append(call(aten.sub.Tensor, writer.item(part, 3), call(aten.mul.Tensor, highest, classes)))
    return {site.root: call(aten.stack.default, summands)}


FUSIONS = (
    Fusion(
        "linear_cross_entropy_part",
        FAMILY,
        _stacked,
        of="logits",
        fits=lambda site: _fits(site) and _product(site) is not None,
        write=_write_linear,
    ),
    Fusion("cross_entropy_part", FAMILY, _stacked, of="logits", fits=_fits, write=_write),
)
