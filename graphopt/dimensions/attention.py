"""Attention."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from graphopt.dimensions.notation import Call, Labels, Rule, Shape, positions, same_size
from graphopt.dimensions.signature import Dimension, Dimensions, Signature

aten = torch.ops.aten


def attention(call: Call) -> Signature | None:
    """``... h s d, ... h t d, ... h t e, ... h s t -> ... h s e``, where `t` and `d` are whole.

    With fewer heads of keys than of queries `h` is ``(g r)`` of queries and `g` of keys. A causal mask depends on where
    a query is, so parts along `s` need one of their own, and ranks that have balanced ones have such parts of keys too;
    dropout draws for the whole.
    """
    query, key, value = (call.shape(name) for name in ("query", "key", "value"))
    assert query is not None and key is not None and value is not None
    labels = Labels()
    heads = _Heads(labels, query, key, value, bool(call["enable_gqa"]))
    batch = positions(max(len(query), len(key)) - 3)

    def named(shape: Shape, rows: str, columns: str) -> Dimensions:
        outer, inner = shape[:-3], shape[-2:] if len(shape) > 1 else shape
        first = tuple(map(labels.name, batch[len(batch) - len(outer) :], outer))
        head = (heads.of(shape[-3]),) if len(shape) > 2 else ()
        return (*first, *head, *map(labels.name, (rows, columns)[2 - len(inner) :], inner))

    tensors = {"query": ("s", "d"), "key": ("t", "d"), "value": ("t", "e"), "attn_mask": ("s", "t")}
    operands = [named(shape, *tensors[name]) for name, shape in zip(call.names, call.operands, strict=True)]
    results = [named(shape, "s", "e") for shape in call.results]
    labels.whole.update({"t", "d"} & labels.sizes.keys())
    localized = labels.sizes if call["dropout_p"] else {"s"} if call["is_causal"] else ()
    linear = [] if call["dropout_p"] else [call.operand("value")]
    found = labels.signature(operands, results, localized=localized, linear=linear)
    is_own = call["is_causal"] and {"s", "t"} <= labels.sizes.keys() and same_size(labels.sizes["s"], labels.sizes["t"])
    return replace(found, matched={"s": "t"}) if found is not None and is_own else found


def context_attention(call: Call) -> Signature | None:
    """``b h s d, b h t d, b h t d -> b h s d`` of a rank's rows, which are whole for another axis, as is `d`."""
    query, key, value = call.operands
    labels = Labels()
    heads = _Heads(labels, query, key, value, True)

    def named(shape: Shape, rows: str) -> Dimensions:
        batch, width = labels.name("b", shape[0]), labels.name("d", shape[3], whole=True)
        return (batch, heads.of(shape[1]), labels.name(rows, shape[2], whole=True), width)

    operands = [named(query, "s"), named(key, "t"), named(value, "t")]
    return labels.signature(operands, [named(query, "s")], linear=[frozenset({2})])


class _Heads:
    """How a dimension of heads is made up."""

    def __init__(self, labels: Labels, query: Shape, key: Shape, value: Shape, grouped: bool) -> None:
        self.labels = labels
        self.few: int | None = None
        if grouped and len(query) > 2 and not same_size(query[-3], key[-3]):
            self.few, self.many = key[-3], query[-3]

    def of(self, size: int) -> Dimension:
        if self.few is None:
            return self.labels.name("h", size)
        if same_size(size, self.many):
            return self.labels.name("g", self.few) + self.labels.name("r", self.many // self.few)
        return self.labels.name("g", size)


RULES: Mapping[object, Rule] = {
    aten.scaled_dot_product_attention: attention,
    torch.ops.graphopt.context_attention: context_attention,
}
