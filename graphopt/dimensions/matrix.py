"""Matrix products."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from graphopt._torch import OpOverload
from graphopt.dimensions.notation import Call, Rule, fit, spell, spelled
from graphopt.dimensions.signature import Signature, operands_of

aten = torch.ops.aten
_BOTH = (("self",), ("mat2",))


def matmul(call: Call) -> Signature | None:
    """``... m k, ... k n -> ... m n``, where vectors lack `m` or `n`."""
    first, second = call.operands
    m, n = " m" * (len(first) > 1), " n" * (len(second) > 1)
    one = "... m k" if m else "k"
    other = "... k n" if n else "k"
    return spell(call, f"{one}, {other} -> ...{m}{n}", linear=[("self",), ("other",)])


def linear(call: Call) -> Signature | None:
    """A bias is added once, so each operand is one of a sum with it."""
    n = " n" * (len(call.shape("weight") or ()) > 1)
    return spell(
        call,
        f"... k,{n} k,{n} -> ...{n}",
        addend="bias",
        linear=[("input", "bias"), ("weight", "bias")],
    )


def added(call: Call) -> Signature | None:
    """A product of the last two operands, to which the first is added, broadcast."""
    addend, *pair = call.names
    left, right, result = _ADDED[call.target.overloadpacket]
    spread = " ".join(result.split()[len(result.split()) - len(call.operands[0]) :])
    text = f"{spread}, {left}, {right} -> {result}"
    return spell(call, text, addend=addend, linear=[(addend, name) for name in pair])


def einsum(call: Call) -> Signature | None:
    """As its equation says, unless that takes a diagonal or has ``...``."""
    left, arrow, right = call["equation"].replace(" ", "").partition("->")
    patterns = left.split(",")
    if "." in left or any(len(set(pattern)) < len(pattern) for pattern in patterns):
        return None
    if not arrow:
        right = "".join(sorted(label for label in set(left) - {","} if left.count(label) == 1))
    found = fit(call, patterns, [right])
    return found and replace(found, linear=tuple(frozenset({index}) for index in range(len(patterns))))


def grouped(call: Call) -> Signature | None:
    """Rows (or sums, or matrices) of one group after another, each with a matrix of its own."""
    first, second = call.operands[:2]
    texts = {
        (2, 3): "t k, e k n, e -> t n",
        (3, 3): "e m k, e k n, e -> e m n",
        (3, 2): "e m k, k t, e -> m t",
        (2, 2): "m t, t n, e -> e m n",
    }
    text = texts[len(first), len(second)]
    arguments = call.names[:2]
    return spell(call, text, whole="t e" if "t" in text else "", linear=[(name,) for name in arguments])


def is_grouped_product(node: fx.Node) -> bool:
    """Whether a call multiplies rows, by group, each with the matrix of its group: (rows, matrices, ends of groups)."""
    if not isinstance(node.target, OpOverload):
        return False
    rule = RULES.get(node.target.overloadpacket) or BY_NAME.get(node.target.name().partition(".")[0])
    return rule is grouped and [each.meta["val"].dim() for each in operands_of(node)] == [2, 3, 1]


_ADDED = {
    aten.addmm: ("m k", "k n", "m n"),
    aten.addmv: ("m k", "k", "m"),
    aten.baddbmm: ("b m k", "b k n", "b m n"),
}
RULES: Mapping[object, Rule] = {
    aten.linear: linear,
    aten.matmul: matmul,
    aten.einsum: einsum,
    aten.mm: spelled("m k, k n -> m n", linear=_BOTH),
    aten.bmm: spelled("b m k, b k n -> b m n", linear=_BOTH),
    aten.mv: spelled("m k, k -> m", linear=(("self",), ("vec",))),
    aten.dot: spelled("k, k ->", linear=(("self",), ("tensor",))),
    aten.outer: spelled("m, n -> m n", linear=(("self",), ("vec2",))),
    **dict.fromkeys(_ADDED, added),
    aten._grouped_mm: grouped,
}
BY_NAME: Mapping[str, Rule] = dict.fromkeys(("graphopt::grouped_mm", "transformers::grouped_mm_fallback"), grouped)
