"""The arguments that an operator takes on parts, where they say sizes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt._torch import OpOverload, declared_arguments
from graphopt.dimensions.notation import Call, Shape, same_size

aten = torch.ops.aten
Changes = Callable[[Call, Sequence[Shape], Sequence[Shape]], Mapping[str, Any]]


def localized_arguments(
    node: fx.Node, operands: Sequence[Shape], results: Sequence[Shape]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `node`'s operator on parts of its operands, which are still the operands themselves.

    operands, results: the shapes of the parts. Sizes that are the same for parts stay as they are given, so that nodes
    which give symbolic sizes stay in their places.
    """
    assert isinstance(node.target, OpOverload)
    args, kwargs = list(node.args), dict(node.kwargs)
    change = _CHANGES.get(node.target.overloadpacket)
    if change is None:
        return tuple(args), kwargs
    places = list(declared_arguments(node.target))
    for name, value in change(Call(node, node.target), operands, results).items():
        if places.index(name) < len(args):
            args[places.index(name)] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs


def _sizes(given: Sequence[Any], whole: Shape, part: Shape) -> list[Any]:
    """The sizes that differ replaced by those of the part."""
    return [
        old if same_size(*sizes) else sizes[1] for old, sizes in zip(given, zip(whole, part, strict=True), strict=True)
    ]


def _shaped(name: str) -> Changes:
    """For operators with an argument that is the shape of the result."""

    def change(call: Call, operands: Sequence[Shape], results: Sequence[Shape]) -> Mapping[str, Any]:
        return {name: _sizes(call[name], call.results[0], results[0])}

    return change


def _unflattened(call: Call, operands: Sequence[Shape], results: Sequence[Shape]) -> Mapping[str, Any]:
    at = call["dim"] % len(operands[0])
    made = slice(at, at + len(call["sizes"]))
    return {"sizes": _sizes(call["sizes"], call.results[0][made], results[0][made])}


def _split(call: Call, operands: Sequence[Shape], results: Sequence[Shape]) -> Mapping[str, Any]:
    """The size of all pieces, or that of each."""
    at = call["dim"] % len(operands[0])
    whole, part = (tuple(shape[at] for shape in shapes) for shapes in (call.results, results))
    name = "split_sizes" if call["split_sizes"] is not None else "split_size"
    given = call[name]
    sizes = _sizes(given if isinstance(given, (list, tuple)) else [given] * len(whole), whole, part)
    return {name: sizes if isinstance(given, (list, tuple)) else sizes[0]}


def _cut(call: Call, operands: Sequence[Shape], results: Sequence[Shape]) -> Mapping[str, Any]:
    """A dimension that is cut is whole, unless all of it is taken."""
    at = call["dim"] % len(operands[0])
    (before, after), part = (shapes[0][at] for shapes in (call.operands, call.results)), operands[0][at]
    name = "length" if call.target.overloadpacket is aten.narrow else "end"
    return {name: part} if same_size(before, after) and not same_size(before, part) else {}


def _grouped(call: Call, operands: Sequence[Shape], results: Sequence[Shape]) -> Mapping[str, Any]:
    """Channels of the image (or, transposed, of the result) are groups times those of the weight's second dimension."""
    image, weight = operands[:2]
    is_transposed = call["transposed"] or call.target.overloadpacket in _TRANSPOSED
    channels = results[0] if is_transposed else image
    return {"groups": channels[-(len(weight) - 1)] // weight[1]}


def _interleaved(call: Call, operands: Sequence[Shape], results: Sequence[Shape]) -> Mapping[str, Any]:
    return {} if call["output_size"] is None else {"output_size": results[0][call["dim"] or 0]}


def _counted(call: Call, operands: Sequence[Shape], results: Sequence[Shape]) -> Mapping[str, Any]:
    """0, 1, 2 and so on, as many as there are rows."""
    return {"end": results[0][0]}


_TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})
_CONVOLUTIONS = (*_TRANSPOSED, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
_OF_SIZE = (
    aten.view, aten._unsafe_view, aten._reshape_copy, aten.expand, aten.broadcast_to, aten.empty, aten.full, aten.ones,
    aten.zeros, aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros,
)  # fmt: skip
_CHANGES: Mapping[object, Changes] = {
    **dict.fromkeys(_OF_SIZE, _shaped("size")),
    **dict.fromkeys(_CONVOLUTIONS, _grouped),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.unsafe_split), _split),
    aten.arange: _counted,
    aten.repeat_interleave: _interleaved,
    aten.reshape: _shaped("shape"),
    **dict.fromkeys((aten.narrow, aten.slice), _cut),
    aten.unflatten: _unflattened,
}
