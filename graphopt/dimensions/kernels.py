"""Operators of kernels (`graphopt.triton_kernels`), known by name: that room is above this one."""

from collections.abc import Mapping

from graphopt.dimensions.notation import Call, Labels, Rule, is_one, same_size, spell, spelled
from graphopt.dimensions.signature import Dimension, Signature


def rotary(call: Call) -> Signature | None:
    """``b (g r) s d, b g s d, b s c, b s c -> b (g r) s d, b g s d``: heads of queries go with theirs of keys."""
    (batch, heads, positions, width), (_, key_heads, _, _), (_, _, half) = call.operands[:3]
    labels = Labels()
    b, s = labels.name("b", batch), labels.name("s", positions)
    d, c = labels.name("d", width, whole=True), labels.name("c", half, whole=True)
    query_heads, keys = _heads(labels, heads, key_heads)
    q, k = (b, query_heads, s, d), (b, keys, s, d)
    angles = [(labels.name("b", shape[0]), s, c) for shape in call.operands[2:]]
    return labels.signature([q, k, *angles], [q, k], linear=[frozenset({0, 1})])


def attention(call: Call) -> Signature | None:
    """``b (g r) s d, b g t d, b g t d -> b (g r) s d, b (g r) s``: what a query reads depends on where it is.

    Of block-sparse attention, also heads stay together if each has a layout of its own.
    """
    (batch, heads, queries, width), (_, key_heads, keys, _) = call.operands[:2]
    labels = Labels()
    b, s, t = labels.name("b", batch), labels.name("s", queries, whole=True), labels.name("t", keys, whole=True)
    d = labels.name("d", width, whole=True)
    offsets = call.shape("row_offsets")
    if offsets is None or is_one(offsets[0]):
        query_heads, shared = _heads(labels, heads, key_heads)
    else:
        query_heads, shared = labels.name("h", heads, whole=True), labels.name("g", key_heads, whole=True)
    others = [tuple(map(labels.apart, shape)) for shape in call.operands[3:]]
    read = (b, shared, t, d)
    return labels.signature(
        [(b, query_heads, s, d), read, read, *others], [(b, query_heads, s, d), (b, query_heads, s)]
    )


def softmax(call: Call) -> Signature | None:
    """``... n, ... n -> ... n``, where `n` is whole, and the rows too of what is causal."""
    rows = f" d{len(call.operands[0]) - 2}" if call["causal"] else ""
    return spell(call, "... n, ... n -> ... n", whole=f"n{rows}")


def _heads(labels: Labels, heads: int, key_heads: int) -> tuple[Dimension, Dimension]:
    """Those of queries, and those of keys, which as many in turn share."""
    if same_size(heads, key_heads):
        both = labels.name("g", key_heads)
        return both, both
    if isinstance(heads, int) and isinstance(key_heads, int) and heads % key_heads == 0:
        keys = labels.name("g", key_heads)
        return (*keys, *labels.name("r", heads // key_heads, whole=True)), keys
    return labels.apart(heads), labels.apart(key_heads)


def together(call: Call) -> Signature | None:
    """Nothing may be split."""
    labels = Labels()
    operands, results = (
        [tuple(map(labels.apart, shape)) for shape in shapes] for shapes in (call.operands, call.results)
    )
    return labels.signature(operands, results)


BY_NAME: Mapping[str, Rule] = {
    "graphopt::rms_norm": spelled("... n, n -> ... n, ...", whole="n"),
    "graphopt::add_rms_norm": spelled("... n, ... n, n -> ... n, ... n, ...", whole="n"),
    "graphopt::layer_norm": spelled("... n, n, n -> ... n, ..., ...", whole="n"),
    "graphopt::add_layer_norm": spelled("... n, ... n, n, n -> ... n, ... n, ..., ...", whole="n"),
    "graphopt::gated": spelled("..., ... -> ...", linear=[("up",)]),
    "graphopt::bias_activation": spelled("... n, n -> ... n"),
    "graphopt::rotary": rotary,
    "graphopt::cross_entropy": spelled("... c, ... -> ..., ...", whole="c"),
    "graphopt::linear_cross_entropy": together,
    "graphopt::softmax": softmax,
    "graphopt::attention": attention,
    "graphopt::sparse_attention": attention,
}
