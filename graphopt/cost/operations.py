"""What one call of a program does: floating-point operations, and bytes that it reads and writes.

Sizes that are symbolic count as in the example, so that counting adds no guard to a capture.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from graphopt._torch import OpOverload
from graphopt.ir.collectives import collective_of
from graphopt.ir.copies import COPY_LAUNCHES
from graphopt.ir.liveness import shares_storage
from graphopt.ir.values import in_example
from graphopt.triton_kernels.attention.masks import pairs, reach

aten = torch.ops.aten

# What they give depends on the shape of their arguments alone.
_READ_NOTHING = frozenset(
    {
        aten.empty_like,
        aten.fill,
        aten.full_like,
        aten.new_empty,
        aten.new_full,
        aten.new_ones,
        aten.new_zeros,
        aten.ones_like,
        aten.rand_like,
        aten.randn_like,
        aten.zeros_like,
    }
)
_WRITE_NOTHING = frozenset({aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided})
# Of their first argument they read as many elements as they give, or as they are given indices.
_READ_CHOSEN = frozenset({aten.embedding, aten.gather, aten.index, aten.index_select, aten.nll_loss_forward, aten.take})


@dataclass(frozen=True)
class Work:
    """What a call does.

    flops: floating-point operations, in `dtype`. read_bytes, written_bytes: what memory must at least give and take,
    where each argument is read once and each result written once.
    """

    flops: int
    read_bytes: int
    written_bytes: int
    dtype: torch.dtype


_NOTHING = Work(0, 0, 0, torch.float32)


def work_of(node: fx.Node) -> Work:
    """What `node` does. Inputs, views, items of lists, collectives, copies, waits and what runs on the host do nothing.

    Matrix multiplications, convolutions and attention do their multiplications and additions, torch's attention also
    those that a mask leaves out; any other call one operation for each element of the largest tensor that it reads or
    writes.
    """
    results = _tensors(node.meta.get("val"))
    if node.op != "call_function" or not results or shares_storage(node):
        return _NOTHING
    if collective_of(node) is not None or node.target in COPY_LAUNCHES:
        return _NOTHING
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else None
    read = [] if packet in _READ_NOTHING else [t for n in node.all_input_nodes for t in _tensors(n.meta.get("val"))]
    written = [] if packet in _WRITE_NOTHING else results
    counts = [_elements(tensor) for tensor in read]
    most = max([*counts, *map(_elements, written)], default=0)
    if packet in _READ_CHOSEN:
        counts[0] = min(counts[0], max([*counts[1:], *map(_elements, written)]))
    flops = contraction_flops(node)
    dtypes = [tensor.dtype for tensor in (*read, *results)]
    # A product is of its first operand's: others may be scales.
    floating = next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0]) if flops is None else dtypes[0]
    return Work(
        most if flops is None else flops,
        sum(count * tensor.element_size() for count, tensor in zip(counts, read, strict=True)),
        sum(_elements(tensor) * tensor.element_size() for tensor in written),
        floating,
    )


def contraction_flops(node: fx.Node) -> int | None:
    """Operations of a matrix multiplication, convolution or attention, two for each multiply-add; None for other calls.

    As `torch.utils.flop_counter` counts them, except for what it does not know, among it (in torch 2.11) attention with
    fewer heads of keys than of queries, and for gradients of grouped convolutions, where it multiplies each group with
    all others.
    """
    if not isinstance(node.target, OpOverload):
        return None
    name, _, _ = node.target.name().partition(".")
    formula = _FORMULAS.get(name) or flop_registry.get(node.target.overloadpacket)
    if formula is None:
        return None
    arguments = [_concrete(argument) for argument in node.args]
    named = {name: _concrete(argument) for name, argument in node.kwargs.items()}
    return int(formula(*arguments, **named, out_val=_concrete(node.meta["val"])))


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return [item for item in values if isinstance(item, torch.Tensor)]


def _concrete(value: Any) -> Any:
    """An argument of a call: tensors for nodes, of the sizes that they have in the example."""
    if isinstance(value, (list, tuple)):
        return [_concrete(item) for item in value]
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in value.shape):
        return torch.empty([in_example(size) for size in value.shape], dtype=value.dtype, device="meta")
    return value


def _elements(tensor: torch.Tensor) -> int:
    """Elements that a tensor holds; those that it repeats count once."""
    sizes = zip(map(in_example, tensor.shape), map(in_example, tensor.stride()), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size)


def _inner_product(first: torch.Tensor, *_: Any, out_val: torch.Tensor, **__: Any) -> int:
    """Every element of the result is a sum along the last dimension of the first argument."""
    return 2 * out_val.numel() * first.shape[-1]


def _grouped_multiplication(first: torch.Tensor, second: torch.Tensor, *_: Any, **__: Any) -> int:
    """Matrices [groups, m, k] @ [groups, k, n]; an argument without groups is cut along a dimension it shares."""
    groups = first.shape[0] if first.dim() == second.dim() == 3 else 1
    return 2 * groups * first.shape[-2] * first.shape[-1] * second.shape[-1]


def _grouped_multiplication_backward(
    first: torch.Tensor, second: torch.Tensor, offsets: Any, gradient: torch.Tensor, **_: Any
) -> int:
    """Each argument's gradient takes as many operations as the product."""
    return 2 * _grouped_multiplication(first, second)


def _convolution_backward(
    gradient: torch.Tensor, image: torch.Tensor, weight: torch.Tensor, *others: Any, out_val: Any, **_: Any
) -> int:
    """Each gradient takes as many operations as the convolution; that of the bias is a sum, and not counted."""
    _bias_sizes, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = others
    places = (image if transposed else gradient).shape[2:]
    gradients = sum(map(bool, output_mask[:2]))
    return 2 * gradients * math.prod(places) * image.shape[0] * weight.numel()


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Queries [..., q, d] with keys [..., k, d], and that with values [..., k, v]; heads as many as of queries."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    """The scores once more, and two products for the gradients of each of the two products."""
    widths = 3 * query.shape[-1] + 2 * value.shape[-1]
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * widths


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, _: Any, ranks: int, *__: Any, **___: Any
) -> int:
    """A rank's two chunks of queries with 2 * ranks + 1 chunks of keys in all (`graphopt.runtime.folded`)."""
    return _attention(query, keys, values) * (2 * ranks + 1) // 4


def _attend_backward(gradient: torch.Tensor, query: torch.Tensor, *others: Any, **_: Any) -> int:
    keys, values, _result, _sums, _scale, ranks, _axis = others
    return _attention_backward(gradient, query, keys, values) * (2 * int(ranks) + 1) // 4


def _linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, *others: Any, **_: Any) -> int:
    """A product for the logits, and one for each gradient that is asked for."""
    of_hidden, of_weight = others[-2:]
    return int(2 * hidden.numel() * weight.shape[0] * (1 + of_hidden + of_weight))


def _linear_cross_entropy_part(hidden: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * hidden.numel() * weight.shape[0]


def _masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: Any, **_: Any) -> int:
    """Scores and their sums of values, of pairs alone that are read."""
    return 4 * q.shape[-1] * _pairs(q, k, *mask)


def _masked_attention_backward(gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *others: Any, **_: Any) -> int:
    """The scores once more, and two products for the gradients of each of the two products."""
    _values, _result, _sums, *mask = others
    return 10 * q.shape[-1] * _pairs(q, k, *mask)


def _pairs(q: torch.Tensor, k: torch.Tensor, starts: Any, _: Any, causal: bool, window: int | None, __: float) -> int:
    """Of queries and keys that they read, of all heads; packed sequences count as if all were as long."""
    sequences = 1 if starts is None else starts.numel() - 1
    each = pairs(q.shape[2] // sequences, k.shape[2] // sequences, reach(causal, window))
    return q.shape[0] * q.shape[1] * sequences * each


def _sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *blocks: Any, **_: Any) -> int:
    return 4 * q.shape[-1] * _listed_pairs(q, *blocks)


def _sparse_attention_backward(gradient: torch.Tensor, q: torch.Tensor, *others: Any, **_: Any) -> int:
    _keys, _values, _result, _sums, *blocks = others
    return 10 * q.shape[-1] * _listed_pairs(q, *blocks)


def _listed_pairs(q: torch.Tensor, offsets: torch.Tensor, blocks: torch.Tensor, *others: Any) -> int:
    """Of queries and keys in blocks that a layout lists, of all heads; those that one masks are computed."""
    _columns, _rows, block, *_ = others
    return int(blocks.numel() * block**2 * q.shape[0] * (q.shape[1] // offsets.shape[0]))


_ATTENTION = (
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)
_FORMULAS: Mapping[str, Callable[..., int]] = {
    **dict.fromkeys(_ATTENTION, _attention),
    **{f"{name}_backward": _attention_backward for name in _ATTENTION},
    "aten::_grouped_mm": _grouped_multiplication,
    "aten::_int_mm": _inner_product,
    "aten::convolution_backward": _convolution_backward,
    "aten::dot": _inner_product,
    "aten::linear": _inner_product,
    "aten::matmul": _inner_product,
    "aten::mv": _inner_product,
    "aten::scaled_dot_product_attention": _attention,
    "graphopt::attend": _attend,
    "graphopt::attend_backward": _attend_backward,
    "graphopt::dynamic_linear": _inner_product,
    "graphopt::grouped_mm": _grouped_multiplication,
    "graphopt::grouped_outer": _grouped_multiplication,
    "graphopt::linear_cross_entropy": _linear_cross_entropy,
    "graphopt::quantized_linear": _inner_product,
    "graphopt::scaled_mm": _inner_product,
    "graphopt::linear_cross_entropy_part": _linear_cross_entropy_part,
    "graphopt::linear_cross_entropy_part_backward": _linear_cross_entropy,
    "graphopt::attention": _masked_attention,
    "graphopt::attention_backward": _masked_attention_backward,
    "graphopt::sparse_attention": _sparse_attention,
    "graphopt::sparse_attention_backward": _sparse_attention_backward,
    "transformers::grouped_mm_fallback": _grouped_multiplication,
    "transformers::grouped_mm_fallback_backward": _grouped_multiplication_backward,
}
