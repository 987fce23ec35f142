"""Splits that a user, or the author of a model, names by module: columns or rows of a weight, or none."""

import enum
import fnmatch
from collections.abc import Iterator, Mapping

from torch import fx

from graphopt.dimensions.classes import DimensionClasses
from graphopt.dimensions.signature import Signature
from graphopt.dimensions.space import Space
from graphopt.dimensions.strategies import Strategy
from graphopt.errors import PassError
from graphopt.ir import facts_of
from graphopt.nearest import nearest


class Style(enum.Enum):
    """How products with the weights of a module are split."""

    COLUMN = "column"  # along what they give: each rank computes some of it
    ROW = "row"  # along what they sum over, or look up in: each rank computes a summand
    WHOLE = "whole"  # not at all


def keep_styled(space: Space, classes: DimensionClasses, patterns: Mapping[str, Style], *, strict: bool) -> int:
    """Leave each product whose module matches a pattern only the strategies of that style. Returns how many.

    patterns: as in fnmatch, of module paths. strict: raise PassError for a pattern that matches no such module, for two
    that contradict each other, and for a style in which a product cannot run; else those go their own way.
    """
    modules = {facts_of(node).module for node in classes.weighted}
    if strict:
        for pattern in patterns:
            if not fnmatch.filter(modules, pattern):
                raise PassError(f"split: no module with weights matches {pattern!r}; {nearest(pattern, modules)}")
    count = 0
    for node in sorted(classes.weighted):
        found = dict(_matching(facts_of(node).module, patterns))
        if strict and len(set(found.values())) > 1:
            said = " and ".join(f"{pattern!r} {style.value}" for pattern, style in found.items())
            raise PassError(f"split: {facts_of(node).module} matches {said}, which contradict each other; keep one")
        style = next(iter(found.values()), None)
        styles = [style_of(classes, node, space.signatures[node], each) for each in space.calls[node]]
        kept = [s for s, its in zip(space.calls[node], styles, strict=True) if style is None or its is style]
        if kept:
            space.calls[node] = kept
            count += style is not None
        elif strict and style is not None:
            ways = sorted({each.value for each in styles if each is not None})
            raise PassError(
                f"split: {facts_of(node).module} cannot be split by {style.value} over {space.ranks} ranks, of which "
                f"each would get a part; it can be {' or '.join(ways)}"
            )
    return count


def style_of(classes: DimensionClasses, node: fx.Node, signature: Signature, strategy: Strategy) -> Style | None:
    """The style that a strategy of a product is of; None along what is not of its weight, such as the sequence."""
    if strategy.cut is None:
        return Style.WHOLE
    if not classes.is_of_weights(node, signature, strategy.cut.label):
        return None
    return Style.ROW if signature.is_reduced(strategy.cut.label) else Style.COLUMN


def _matching(module: str, patterns: Mapping[str, Style]) -> Iterator[tuple[str, Style]]:
    for pattern, style in patterns.items():
        if fnmatch.fnmatchcase(module, pattern):
            yield pattern, style
