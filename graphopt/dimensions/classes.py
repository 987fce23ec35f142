"""Which dimensions of a program are one and the same: the classes that axes are assigned to."""

from collections import defaultdict
from collections.abc import Iterator

import networkx as nx
from torch import fx

from graphopt.dimensions.signature import Dimensions, Signature, operands_of
from graphopt.dimensions.space import Value, is_item, value_of
from graphopt.dimensions.table import signature_of
from graphopt.ir import InputKind, Program
from graphopt.ir.effects import is_view
from graphopt.ir.moves import MOVES

Place = tuple[Value, int]  # a value, and which of its dimensions


class DimensionClasses:
    """Dimensions joined where an operator gives them one label; of a product, by the outermost that can be split.

    What is known of a class is what its places are: dimensions of the call's arguments, and of weights in products.
    products: calls that multiply operands, or look up in one. weighted: those of them that do so with a weight.
    """

    def __init__(self, program: Program) -> None:
        self._classes: nx.utils.UnionFind[object] = nx.utils.UnionFind()
        self._parameters = {node for _, node in program.nodes_of(InputKind.PARAMETER)}
        self.products: set[fx.Node] = set()
        self.weighted: set[fx.Node] = set()
        weights: list[Place] = []
        for node in program.compute_nodes():
            signature = None if is_item(node) else signature_of(node)
            if signature is not None:
                self._join(node, signature)
                if is_product(signature):
                    self.products.add(node)
                    found = list(self._weights(node, signature))
                    weights += found
                    self.weighted.update([node] if found else [])
        self._of_weights = {self._classes[place] for place in weights}
        self._of_batch: defaultdict[object, set[int]] = defaultdict(set)
        for _, node in program.nodes_of(InputKind.BATCH):
            for dim in range(len(getattr(node.meta["val"], "shape", ()))):
                self._of_batch[self._classes[(node, 0), dim]].add(dim)

    def batch_dims(self, node: fx.Node, signature: Signature, label: str) -> set[int]:
        """Which dimensions of arguments of the model are one with a label of a call: 0 is the batch, 1 the sequence."""
        return {dim for root in self._roots(node, signature, label) for dim in self._of_batch.get(root, ())}

    def is_of_weights(self, node: fx.Node, signature: Signature, label: str) -> bool:
        """Whether a label of a call is a dimension of a weight in a matrix product, a convolution or a lookup."""
        return not self._of_weights.isdisjoint(self._roots(node, signature, label))

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a node is a parameter, seen through views and moves over other axes."""
        while node.op == "call_function" and (is_view(node) or node.target in MOVES) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node in self._parameters

    def _join(self, node: fx.Node, signature: Signature) -> None:
        places: defaultdict[str, list[Place]] = defaultdict(list)
        for place, label in _labelled(node, signature):
            places[label].append(place)
        for members in places.values():
            self._classes.union(*members)

    def _weights(self, node: fx.Node, signature: Signature) -> Iterator[Place]:
        for operand, dimensions in zip(operands_of(node), signature.operands, strict=True):
            if self.is_weight(operand) and len(dimensions) > 1:
                yield from ((value_of(operand), dim) for dim, _ in _outermost(dimensions, signature))

    def _roots(self, node: fx.Node, signature: Signature, label: str) -> set[object]:
        return {self._classes[place] for place, each in _labelled(node, signature) if each == label}


def _labelled(node: fx.Node, signature: Signature) -> Iterator[tuple[Place, str]]:
    values = [value_of(operand) for operand in operands_of(node)]
    values += [(node, index) for index in range(len(signature.results))]
    for value, dimensions in zip(values, (*signature.operands, *signature.results), strict=True):
        for dim, label in _outermost(dimensions, signature):
            yield (value, dim), label


def _outermost(dimensions: Dimensions, signature: Signature) -> Iterator[tuple[int, str]]:
    for dim, labels in enumerate(dimensions):
        label = next((label for label in labels if label not in signature.whole and signature.sizes[label] != 1), None)
        if label is not None:
            yield dim, label


def is_product(signature: Signature) -> bool:
    """Whether a call sums over what operands have in common, or looks up in one by the other: it is linear in one."""
    labels = [{label for dim in dimensions for label in dim} for dimensions in signature.operands]
    shared = {label for i, one in enumerate(labels) for other in labels[i + 1 :] for label in one & other}
    return bool(signature.linear) and any(
        map(signature.is_reduced, shared | (signature.localized & set().union(*labels)))
    )
