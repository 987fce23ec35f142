"""How many bytes a value takes: the tensor itself, and the storage that the call allocates for it."""

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import fx

from graphopt._torch import OpOverload, argument
from graphopt.ir.collectives import Collective, sources_of
from graphopt.ir.values import byte_size

aten = torch.ops.aten
Size = TypeVar("Size")

# They compute each element's loss in the storage of the result, and give its first element as the sum or mean of all.
_REDUCED_IN_RESULT = frozenset(
    {aten.mse_loss, aten.smooth_l1_loss, aten.binary_cross_entropy, aten.soft_margin_loss},
)


class Sizes(Generic[Size]):
    """Bytes as numbers, or as expressions over symbols; ranks of each axis likewise."""

    def value(self, value: torch.Tensor) -> Size:
        """Bytes of a tensor whose size is the same on any number of ranks."""
        raise NotImplementedError

    def tensor(self, node: fx.Node) -> Size:
        """Bytes of a node's tensor."""
        raise NotImplementedError

    def in_dtype(self, node: fx.Node, dtype: torch.dtype) -> Size:
        """Bytes of a tensor of that dtype with as many elements."""
        raise NotImplementedError

    def scalar(self, dtype: torch.dtype) -> Size:
        """Bytes of one number."""
        raise NotImplementedError

    def total(self, sizes: Iterable[Size]) -> Size:
        """Their sum."""
        raise NotImplementedError

    def times_ranks(self, size: Size, axis: str) -> Size:
        """As much from every rank of an axis."""
        raise NotImplementedError

    def share(self, collective: Collective) -> Size:
        """Bytes of a rank's part of what a collective reduces: as many elements for each rank, rounded up."""
        raise NotImplementedError

    def storage(self, node: fx.Node) -> Size:
        """Bytes that a call allocates for its result."""
        return self.tensor(filled_by(node))

    def sources(self, collective: Collective) -> Size:
        """Bytes of what a rank gives to a collective."""
        return self.total(self.tensor(source) for source in sources_of(collective.node))

    def padding(self, collective: Collective) -> Size:
        """Bytes that are added to what a collective reduces, so that all parts are equal."""
        raise NotImplementedError

    def whole(self, collective: Collective) -> Size:
        """Bytes on the side of a collective where tensors are whole; those to be reduced in equal parts are padded."""
        part = self.share(collective) if collective.kind == "all-reduce" else self.sources(collective)
        is_part = collective.kind in ("all-gather", "all-reduce")
        return self.times_ranks(part, collective.axis) if is_part else part


class ExampleSizes(Sizes[int]):
    """Numbers; symbolic sizes count as in the example. mesh: axis -> ranks."""

    def __init__(self, mesh: Mapping[str, int]) -> None:
        self._mesh = mesh

    def value(self, value: torch.Tensor) -> int:
        return byte_size(value)

    def tensor(self, node: fx.Node) -> int:
        return byte_size(node.meta["val"])

    def in_dtype(self, node: fx.Node, dtype: torch.dtype) -> int:
        value = node.meta["val"]
        return byte_size(value) // int(value.element_size()) * dtype.itemsize

    def scalar(self, dtype: torch.dtype) -> int:
        return dtype.itemsize

    def total(self, sizes: Iterable[int]) -> int:
        return sum(sizes)

    def times_ranks(self, size: int, axis: str) -> int:
        return size * self._mesh[axis]

    def share(self, collective: Collective) -> int:
        item = int(sources_of(collective.node)[0].meta["val"].element_size())
        return item * -(-self.sources(collective) // (item * self._mesh[collective.axis]))

    def padding(self, collective: Collective) -> int:
        return self.whole(collective) - self.sources(collective)


def filled_by(node: fx.Node) -> fx.Node:
    """The node whose value is as large as the storage that `node` allocates: itself, but for some losses."""
    target = node.target
    if not (isinstance(target, OpOverload) and target.overloadpacket in _REDUCED_IN_RESULT):
        return node
    if argument(target, "reduction", node.args, node.kwargs) == 0:
        return node
    return max((n for n in node.args[:2] if isinstance(n, fx.Node)), key=lambda n: byte_size(n.meta["val"]))
