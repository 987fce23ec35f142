"""Operators of kernels (`graphopt.triton_kernels`), known by name: that room is above this one."""

from collections.abc import Mapping

from graphopt.dimensions.notation import Call, Labels, Rule, same_size, spelled
from graphopt.dimensions.signature import Signature


def rotary(call: Call) -> Signature | None:
    """``b (g r) s d, b g s d, b s c, b s c -> b (g r) s d, b g s d``: heads of queries go with theirs of keys."""
    (batch, heads, positions, width), (_, key_heads, _, _), (_, _, half) = call.operands[:3]
    labels = Labels()
    b, s = labels.name("b", batch), labels.name("s", positions)
    d, c = labels.name("d", width, whole=True), labels.name("c", half, whole=True)
    if same_size(heads, key_heads):
        query_heads = keys = labels.name("g", key_heads)
    elif isinstance(heads, int) and isinstance(key_heads, int) and heads % key_heads == 0:
        keys = labels.name("g", key_heads)
        query_heads = (*keys, *labels.name("r", heads // key_heads, whole=True))
    else:
        query_heads, keys = labels.apart(heads), labels.apart(key_heads)
    q, k = (b, query_heads, s, d), (b, keys, s, d)
    angles = [(labels.name("b", shape[0]), s, c) for shape in call.operands[2:]]
    return labels.signature([q, k, *angles], [q, k], linear=[frozenset({0, 1})])


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
    "graphopt::route": spelled("t e, e -> t k, t k", whole="e k"),
    "graphopt::sort_by_expert": together,
    "graphopt::permute_tokens": spelled("t h, t k -> n h", whole="t k n", linear=[("x",)]),
    "graphopt::unpermute_tokens": spelled("n h, t k, t k -> t h", whole="n t k", linear=[("rows",), ("weights",)]),
}
