"""Operators that look elements up, or put them, by indices; and losses that look up a class."""

from collections.abc import Mapping, Sequence

import torch

from graphopt.dimensions.notation import Call, Labels, Rule, Shape, positions, same_size, spell, spelled
from graphopt.dimensions.signature import Dimension, Dimensions, Signature

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # the values of `reduction`


class _Indexing:
    """``x[:, i, j]``: which dimensions are indexed, and what stands for them.

    operand: labels of `x`, those that are indexed whole. index: of the indices, broadcast. chosen: of ``x[:, i, j]``.
    """

    def __init__(self, call: Call) -> None:
        self.labels = Labels()
        shape = call.operands[0]
        at = [place for place, item in enumerate(call["indices"]) if item is not None]
        indices = [s for name, s in zip(call.names, call.operands, strict=True) if name == "indices"]
        rank = max(map(len, indices))
        self.index: list[Dimension] = [()] * rank
        self.indices = [self._index(each, rank) for each in indices]
        places = zip(positions(len(shape)), shape, strict=True)
        self.operand = tuple(self.labels.name(p, size, whole=i in at) for i, (p, size) in enumerate(places))
        first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
        rest = [dimension for place, dimension in enumerate(self.operand) if place not in at]
        self.chosen: Dimensions = (*rest[:first], *self.index, *rest[first:])

    def _index(self, shape: Shape, rank: int) -> Dimensions:
        places = range(rank - len(shape), rank)
        named = tuple(self.labels.name(f"i{place}", size) for place, size in zip(places, shape, strict=True))
        for place, dimension in zip(places, named, strict=True):
            self.index[place] = self.index[place] or dimension
        return named


def index(call: Call) -> Signature | None:
    """What is indexed is needed whole, and the dimensions of the indices are carried."""
    if _has_mask(call):
        return None
    found = _Indexing(call)
    return found.labels.signature([found.operand, *found.indices], [found.chosen], linear=[frozenset({0})])


def index_put(call: Call) -> Signature | None:
    """What is indexed is needed whole, and all indices too."""
    if _has_mask(call):
        return None
    found = _Indexing(call)
    found.labels.whole.update(label for dimension in found.index for label in dimension)
    values = call.shape("values") or ()
    put = found.chosen[len(found.chosen) - len(values) :]
    put = tuple(dimension if size != 1 else () for dimension, size in zip(put, values, strict=True))
    return found.labels.signature(
        [found.operand, *found.indices, put], [found.operand], linear=[call.operand("self", "values")]
    )


def _has_mask(call: Call) -> bool:
    """Whether an index is a mask, which makes shapes depend on values."""
    given = [item for item in call["indices"] if item is not None]
    return any(item.meta["val"].dtype in (torch.bool, torch.uint8) for item in given)


def index_select(call: Call) -> Signature | None:
    """``a v c, i -> a i c``."""
    before, at = call.operands[0], call["dim"]
    names = positions(len(before))
    names[at] = "v"
    chosen = list(names)
    chosen[at] = "i"
    text = f"{' '.join(names)}, {'i' * len(call.operands[1])} -> {' '.join(chosen)}"
    return spell(call, text, localized="v", linear=[("self",)])


def gather(call: Call) -> Signature | None:
    """``a v c, a i c -> a i c``; dimensions of which the indices do not reach the end are whole."""
    before, given = call.operands
    at = call["dim"] % max(len(before), 1)
    labels = Labels()
    operand, chosen = [], []
    for place, (size, few) in enumerate(zip(before, given, strict=True)):
        alike = place != at and same_size(size, few)
        chosen.append(labels.name(f"d{place}", few, whole=place != at and not alike))
        operand.append(chosen[-1] if alike else labels.name(f"v{place}", size, whole=place != at))
    return labels.signature(
        [tuple(operand), tuple(chosen)], [tuple(chosen)], localized=[f"v{at}"], linear=[frozenset({0})]
    )


def scatter(call: Call) -> Signature | None:
    """``a v c, a i c, a i c -> a v c``, where `v` and `i` are whole, and what does not reach the end."""
    at = call["dim"] % max(len(call.operands[0]), 1)
    shape = call.operands[0]
    labels = Labels()
    operand = tuple(labels.name(p, size, whole=i == at) for i, (p, size) in enumerate(_placed(shape)))
    for other in call.operands[1:]:
        for place, (size, whole) in enumerate(zip(other, shape, strict=True)):
            if place != at and not same_size(size, whole):
                labels.whole.update(operand[place])
    others = [
        tuple(
            operand[place] if place != at and same_size(size, shape[place]) else labels.apart(size)
            for place, size in enumerate(other)
        )
        for other in call.operands[1:]
    ]
    linear = call.operand("self", "src") if call["reduce"] is None and call["src"] is not None else frozenset()
    return labels.signature([operand, *others], [operand], linear=[linear])


def _placed(shape: Shape) -> Sequence[tuple[str, int]]:
    return list(zip(positions(len(shape)), shape, strict=True))


def index_add(call: Call) -> Signature | None:
    """``a v c, i, a i c -> a v c``, where `v` and `i` are whole."""
    names = positions(len(call.operands[0]))
    names[call["dim"]] = "v"
    chosen = list(names)
    chosen[call["dim"]] = "i"
    text = f"{' '.join(names)}, {'i' * len(call.operands[1])}, {' '.join(chosen)} -> {' '.join(names)}"
    return spell(call, text, whole="v i", linear=[("self", "source")])


def class_loss(call: Call) -> Signature | None:
    """``n c ..., n ..., c -> n ...``, or its mean or sum; a target may be probabilities ``n c ...`` too.

    A mean is over the tokens that are not ignored.
    """
    logits, target = call.operands[:2]
    labels = Labels()
    places = ["c"] if len(logits) == 1 else ["n", "c", *positions(len(logits) - 2)]
    named = tuple(map(labels.name, places, logits))
    tokens = tuple(dimension for place, dimension in zip(places, named, strict=True) if place != "c")
    classes = tuple(dimension for place, dimension in zip(places, named, strict=True) if place == "c")
    likely = len(target) == len(logits)
    if likely:
        labels.whole.update(classes[0])
    given = {"self": named, "target": named if likely else tokens, "weight": classes}
    reduction = call["reduction"]
    localized = {"c"} | ({label for dimension in tokens for label in dimension} if reduction == _MEAN else set())
    results = [() if reduction in (_MEAN, _SUM) else tokens]
    results += [()] * (len(call.results) - 1)
    return labels.signature([given[name] for name in call.names], results, localized=localized)


def embedding(call: Call) -> Signature | None:
    """``v h, ... -> ... h``; gradients that are divided by how often each row is read are of all tokens at once."""
    if call["scale_grad_by_freq"]:
        return spelled("v h, ... -> ... h", whole="v ...")(call)
    return spelled("v h, ... -> ... h", localized="v", linear=[("weight",)])(call)


RULES: Mapping[object, Rule] = {
    **dict.fromkeys((aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss2d, aten.nll_loss_nd), class_loss),
    **dict.fromkeys((aten.scatter, aten.scatter_add, aten.scatter_reduce), scatter),
    **dict.fromkeys((aten.index_add, aten.index_copy), index_add),
    aten.embedding: embedding,
    aten.gather: gather,
    aten.index: index,
    aten.index_put: index_put,
    aten.index_select: index_select,
    **dict.fromkeys((aten.bucketize, aten.isin), spelled("..., v -> ...", whole="v")),
    aten.searchsorted: spelled("v, ... -> ...", whole="v"),
    aten.one_hot: spelled("... -> ... c", whole="c"),
    **dict.fromkeys((aten.histc, aten.bincount), spelled("... -> bins", whole="... bins")),
}
