"""What the pass `split` may cut, and what it is there to cut."""

from torch import fx

from graphopt.dimensions.classes import DimensionClasses
from graphopt.dimensions.signature import Signature, operands_of
from graphopt.dimensions.strategies import Cut
from graphopt.ir import Program
from graphopt.passes.split_locally import can_be_localized


class WeightRules:
    """Of an axis that splits weights: their dimensions in products, and none that an argument of the model has.

    sequence: the sequence too, so that what lies between products is not computed by all ranks.
    """

    def __init__(self, program: Program, ranks: int, sequence: bool) -> None:
        self._ranks = ranks
        self._sequence = sequence
        self._classes = DimensionClasses(program)
        self._allowed: dict[tuple[fx.Node, str], bool] = {}

    @property
    def weighted(self) -> set[fx.Node]:
        """Products with weights: what the axis is there to split."""
        return self._classes.weighted

    def is_wanted(self, node: fx.Node) -> bool:
        """Whether a call is work that no two ranks should do both: any product."""
        return node in self._classes.products

    def may_cut(self, node: fx.Node, signature: Signature, cut: Cut) -> bool:
        """Whether a call may run on such parts."""
        if cut.label in signature.localized and not can_be_localized(node, signature, cut):
            return False
        is_even = cut.blocks * cut.chunk * self._ranks == signature.sizes[cut.label]
        if not is_even and not self._pads_with_zeros(node, signature, cut.label):
            return False
        key = (node, cut.label)
        if key not in self._allowed:
            self._allowed[key] = self._is_allowed(node, signature, cut.label)
        return self._allowed[key]

    def _is_allowed(self, node: fx.Node, signature: Signature, label: str) -> bool:
        dims = self._classes.batch_dims(node, signature, label)
        if self._sequence and 1 in dims and 0 not in dims:
            return True
        return not dims & {0, 1} and self._classes.is_of_weights(node, signature, label)

    def _pads_with_zeros(self, node: fx.Node, signature: Signature, label: str) -> bool:
        """Whether what fills up the last part does not count: in a sum, it meets the zeros of a weight."""
        if not signature.is_reduced(label):
            return True
        return any(
            self._classes.is_weight(operand)
            for index, (operand, dimensions) in enumerate(zip(operands_of(node), signature.operands, strict=True))
            if index not in signature.addends and any(label in dim for dim in dimensions)
        )
