"""Operators of kernels (`graphopt.triton_kernels`), known by name: that room is above this one."""

from collections.abc import Mapping, Sequence

from graphopt.dimensions.elementwise import random
from graphopt.dimensions.notation import Call, Labels, Rule, Shape, is_one, positions, same_size, spell, spelled
from graphopt.dimensions.signature import Dimension, Dimensions, Signature


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


def quantize_weight(call: Call) -> Signature | None:
    """``n (g r) -> n (g b), n g, n g``: a group of `r` inputs becomes `b` bytes."""
    return _of_groups(call, call.results[1][1], ("weight",), ("values", "scales", "zeros"))


def dequantize_weight(call: Call) -> Signature | None:
    """``n (g b), n g, n g -> n (g r)``."""
    return _of_groups(call, call.operands[1][1], call.names, ("weight",))


def quantized_linear(call: Call) -> Signature | None:
    """``... (g r), n (g b), n g, n g, n -> ... n``: groups may be apart, and their products added up."""
    return _of_groups(call, call.operands[2][1], call.names, ("y",))


def scaled_mm(call: Call) -> Signature | None:
    """``... k, ..., n k, n, n -> ... n``, where all may have one scale."""
    x_scales = "..." if call.shape("x_scales") else ""
    weight_scales = "n" if call.shape("weight_scales") else ""
    return spell(call, f"... k, {x_scales}, n k, {weight_scales}, n -> ... n", addend="bias")


def _of_groups(call: Call, groups: int, operands: Sequence[str], results: Sequence[str]) -> Signature | None:
    """The signature of a call with weights of so many groups, whose tensors are what their names say."""
    labels = Labels()

    def grouped(part: str, size: int) -> Dimension:
        if isinstance(size, int) and isinstance(groups, int) and groups and size % groups == 0:
            return (*labels.name("g", groups), *labels.name(part, size // groups, whole=True))
        return labels.apart(size)

    def last(what: str, size: int) -> Dimension:
        if what in ("y", "bias"):
            return labels.name("n", size)
        if what in ("scales", "zeros"):
            return labels.name("g", size)
        return grouped("b" if what == "values" else "r", size)

    def named(what: str, shape: Shape) -> Dimensions:
        of_rows = positions(len(shape) - 1) if what in ("x", "y") else ["n"] * (len(shape) - 1)
        return (*map(labels.name, of_rows, shape), last(what, shape[-1]))

    return labels.signature(
        list(map(named, operands, call.operands)),
        list(map(named, results, call.results)),
        addends=call.operand("bias"),
        linear=[call.operand("x", "bias")] if "x" in operands else [],
    )


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
    "graphopt::add_rms_norm": spelled("... n, ... n, n, ... n -> ... n, ... n, ...", whole="n"),
    "graphopt::layer_norm": spelled("... n, n, n -> ... n, ..., ...", whole="n"),
    "graphopt::add_layer_norm": spelled("... n, ... n, n, n, ... n -> ... n, ... n, ..., ...", whole="n"),
    "graphopt::dropout_mask": random,
    "graphopt::gated": spelled("..., ... -> ...", linear=[("up",)]),
    "graphopt::bias_activation": spelled("... n, n -> ... n"),
    "graphopt::rotary": rotary,
    "graphopt::cross_entropy": spelled("... c, ... -> ..., ...", whole="c"),
    "graphopt::cross_entropy_part": spelled("... c, ... -> ..., ..., ..., ...", whole="c"),
    "graphopt::linear_cross_entropy": together,
    "graphopt::quantize_weight": quantize_weight,
    "graphopt::dequantize_weight": dequantize_weight,
    "graphopt::quantized_linear": quantized_linear,
    "graphopt::quantize_rows": spelled("... n -> ... n, ...", whole="n"),
    "graphopt::quantize_tensor": together,
    "graphopt::scaled_mm": scaled_mm,
    "graphopt::dynamic_linear": spelled("... k, n k, n, n -> ... n", whole="k", addend="bias"),
    "graphopt::quantize_blocks": together,
    "graphopt::dequantize_blocks": together,
    "graphopt::linear_cross_entropy_part": spelled("n h, c h, n -> n, n, n, n", whole="h c"),
    "graphopt::route": spelled("t e, e -> t k, t k", whole="e k"),
    "graphopt::sort_by_expert": together,
    "graphopt::permute_tokens": spelled("t h, t k -> n h", whole="t k n", linear=[("x",)]),
    "graphopt::unpermute_tokens": spelled("n h, t k, t k -> t h", whole="n t k", linear=[("rows",), ("weights",)]),
    "graphopt::softmax": softmax,
    "graphopt::attention": attention,
    "graphopt::sparse_attention": attention,
}
