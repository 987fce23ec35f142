"""What the pass `split` may cut over an axis, and what the axis is there for."""

from abc import ABC, abstractmethod

from torch import fx

from graphopt.dimensions.classes import DimensionClasses
from graphopt.dimensions.forms import BALANCED
from graphopt.dimensions.matrix import is_grouped_product
from graphopt.dimensions.signature import Signature, operands_of
from graphopt.dimensions.strategies import Cut
from graphopt.ir import InputKind, Program
from graphopt.passes.causal_masks import ATTENTION
from graphopt.passes.split_locally import can_be_localized

_NO_SEQUENCE = frozenset({"h", "g", "r", "e"})  # of attention: heads and the width of values


class Rules(ABC):
    """Of one axis: which calls may run on which parts.

    Dimensions are told apart by their class (`graphopt.dimensions.classes`). A cut in several blocks is always one of a
    neighbour's, and as good as that.

    products: those that it is there to split; of_interest says which those are. whole_parameters: those that every rank
    has, by name. dispatches: whether rows go to the ranks that have what they are multiplied by. most_ranks: over how
    many something could be split.
    """

    of_interest = "products with weights"
    dispatches = False
    most_ranks = 1

    def __init__(self, program: Program, ranks: int) -> None:
        self._ranks = ranks
        self.classes = DimensionClasses(program)
        self.products = self.classes.weighted
        self.whole_parameters: list[str] = []
        self._allowed: dict[tuple[fx.Node, str], bool] = {}

    def is_wanted(self, node: fx.Node) -> bool:
        """Whether a call is work that no two ranks should do both: any product."""
        return node in self.classes.products

    def may_cut(self, node: fx.Node, signature: Signature, cut: Cut) -> bool:
        """Whether a call may run on such parts."""
        if cut.label in signature.localized and not can_be_localized(node, signature, cut):
            return False
        is_even = cut.blocks * cut.chunk * self._ranks == signature.sizes[cut.label]
        if cut.order is BALANCED and not (is_even and cut.chunk % 2 == 0):
            return False
        if not is_even and not self._pads_with_zeros(node, signature, cut.label):
            return False
        key = (node, cut.label)
        if key not in self._allowed:
            dims = self.classes.batch_dims(node, signature, cut.label)
            self._allowed[key] = self._is_allowed(node, signature, cut.label, dims)
        return cut.blocks > 1 or self._allowed[key]

    @abstractmethod
    def _is_allowed(self, node: fx.Node, signature: Signature, label: str, dims: set[int]) -> bool:
        """dims: of the model's arguments, those that are one with the label: 0 is the batch, 1 the sequence."""

    def _pads_with_zeros(self, node: fx.Node, signature: Signature, label: str) -> bool:
        """Whether what fills up the last part does not count: in a sum, it meets the zeros of a weight."""
        if not signature.is_reduced(label):
            return True
        return any(
            self.classes.is_weight(operand)
            for index, (operand, dimensions) in enumerate(zip(operands_of(node), signature.operands, strict=True))
            if index not in signature.addends and any(label in dim for dim in dimensions)
        )


class WeightRules(Rules):
    """Dimensions of weights in products; with `sequence`, between products the sequence too."""

    def __init__(self, program: Program, ranks: int, sequence: bool) -> None:
        super().__init__(program, ranks)
        self._sequence = sequence

    def _is_allowed(self, node: fx.Node, signature: Signature, label: str, dims: set[int]) -> bool:
        if self._sequence and 1 in dims and 0 not in dims:
            return True
        return not dims & {0, 1} and self.classes.is_of_weights(node, signature, label)


class SequenceRules(Rules):
    """The sequence; with `heads`, in attention its heads in place of it (Jacobs et al. 2023)."""

    def __init__(self, program: Program, ranks: int, heads: bool) -> None:
        super().__init__(program, ranks)
        self.whole_parameters = [role.name for role, _ in program.nodes_of(InputKind.PARAMETER)]
        self._heads = heads

    def _is_allowed(self, node: fx.Node, signature: Signature, label: str, dims: set[int]) -> bool:
        if dims:
            return 1 in dims and 0 not in dims
        if node.target is ATTENTION and label in _NO_SEQUENCE:
            return self._heads and label != "e"
        if not self.classes.is_of_weights(node, signature, label):
            return True  # a sequence that the model makes itself: shifted, or of patches
        return self._heads and node not in self.classes.weighted and not signature.is_reduced(label)


class ExpertRules(Rules):
    """The batch; and of products by group, the groups, to which the rows of the batch are dispatched."""

    of_interest = "products of rows by group with weights (as experts='grouped_mm' of Transformers has)"
    dispatches = True

    def __init__(self, program: Program, ranks: int) -> None:
        super().__init__(program, ranks)
        self.products = {node for node in program.compute_nodes() if is_grouped_product(node)}
        matrices = {_source(operands_of(product)[1]) for product in self.products}
        parameters = program.nodes_of(InputKind.PARAMETER)
        self.whole_parameters = [role.name for role, node in parameters if node not in matrices]
        self.most_ranks = min((operands_of(each)[1].meta["val"].shape[0] for each in self.products), default=1)
        self._matrices = matrices

    def _is_allowed(self, node: fx.Node, signature: Signature, label: str, dims: set[int]) -> bool:
        return 0 in dims or (not dims and _source(node) in self._matrices)


def _source(node: fx.Node) -> fx.Node:
    """What a value is made of alone, as a cast and transposed matrix is of a parameter."""
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node
