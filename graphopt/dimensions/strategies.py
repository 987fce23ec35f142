"""The ways in which one call can run over the ranks of an axis."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphopt.dimensions.forms import BALANCED, PARTIAL, REPLICATED, VARYING, Form, Kind, Order, Part
from graphopt.dimensions.signature import Dimension, Signature


@dataclass(frozen=True)
class Cut:
    """Along `label`, `blocks` equal blocks of it are cut into parts of `chunk`, one for each rank.

    order: in which a rank has their rows; None for that of the whole.
    """

    label: str
    blocks: int
    chunk: int
    order: Order | None = None


@dataclass(frozen=True)
class Strategy:
    """The forms in which a call takes its operands and gives its results; cut is None where it runs whole."""

    cut: Cut | None
    operands: tuple[Form, ...]
    results: tuple[Form, ...]


def whole_strategies(signature: Signature) -> Iterator[Strategy]:
    """On every rank the same: from values to values, and from summands to a summand where the call is linear."""
    operands, results = len(signature.operands), len(signature.results)
    for form in (REPLICATED, VARYING):
        yield Strategy(None, (form,) * operands, (form,) * results)
    for together in signature.linear:
        forms: list[Kind] = [PARTIAL if operand in together else VARYING for operand in range(operands)]
        yield Strategy(None, tuple(forms), (PARTIAL,) * results)


def split_strategy(signature: Signature, cut: Cut) -> Strategy:
    """On every rank a part along a label."""
    is_reduced = signature.is_reduced(cut.label)
    matched = signature.matched.get(cut.label) if cut.order is BALANCED else None
    operands: list[Form] = []
    for operand, dimensions in enumerate(signature.operands):
        part = _part_of(dimensions, cut, signature)
        if part is None and matched is not None:
            part = _part_of(dimensions, replace(cut, label=matched), signature)
        without = PARTIAL if is_reduced and operand in signature.addends else VARYING
        operands.append(without if part is None else part)
    results = [_part_of(dimensions, cut, signature) or PARTIAL for dimensions in signature.results]
    return Strategy(cut, tuple(operands), tuple(results))


def has_fixed_blocks(signature: Signature, cut: Cut) -> bool:
    """Whether it is known into how many blocks each dimension is cut, and how wide they are: not if batches vary."""
    products = (dim for dimensions in (*signature.operands, *signature.results) for dim in dimensions)
    factors = (signature.sizes[label] for dim in products if cut.label in dim for label in dim if label != cut.label)
    return all(type(size) is int for size in factors)


def can_carry(signature: Signature, cut: Cut) -> bool:
    """Whether what a call gives of rows in an order of their own stands in that order, or is a sum over them."""
    assert cut.order is not None
    if cut.label in signature.localized:
        return False
    return not (signature.is_reduced(cut.label) and cut.order.standing.has_gaps)


def own_cuts(signature: Signature, ranks: int, order: Order | None = None) -> Iterator[Cut]:
    """Each label that can be split, in parts as equal as can be, none of them empty; in that order where it can be."""
    for label in signature.labels:
        size = signature.sizes[label]
        chunk = even_chunk(size, ranks)
        if chunk is not None:
            yield Cut(label, 1, chunk, order if order is not BALANCED or is_balanced(size, chunk, ranks) else None)


def is_balanced(size: int, chunk: int, ranks: int) -> bool:
    """Whether parts of `chunk` are equal and have two halves, one of either end of `size`."""
    return chunk % 2 == 0 and chunk * ranks == size


def even_chunk(size: object, ranks: int) -> int | None:
    """Rows of the largest part; None if a rank would get nothing, or the size is no number."""
    if type(size) is not int:
        return None
    chunk = -(-size // ranks)
    return chunk if (ranks - 1) * chunk < size else None


def cut_by(signature: Signature, dimensions: tuple[Dimension, ...], part: Part) -> Cut | None:
    """The cut of which an operand or result of `dimensions` takes `part`; None if there is none."""
    dimension = dimensions[part.dim]
    inner = math.prod(signature.sizes[label] for label in dimension)
    outer = 1
    for label in dimension:
        size = signature.sizes[label]
        if type(size) is not int or type(inner) is not int:
            return None
        inner //= size
        if label not in signature.whole and part.blocks % outer == 0 and part.chunk % inner == 0:
            blocks, chunk = part.blocks // outer, part.chunk // inner
            has_room = part.order is not None and part.order.standing.has_gaps
            if size % blocks == 0 and (chunk <= size // blocks or has_room) and size > 1:
                return Cut(label, blocks, chunk, part.order)
        outer *= size
    return None


def _part_of(dimensions: tuple[Dimension, ...], cut: Cut, signature: Signature) -> Part | None:
    for dim, labels in enumerate(dimensions):
        if cut.label in labels:
            at = labels.index(cut.label)
            outer = math.prod(signature.sizes[label] for label in labels[:at])
            inner = math.prod(signature.sizes[label] for label in labels[at + 1 :])
            return Part(dim, outer * cut.blocks, cut.chunk * inner, cut.order)
    return None
