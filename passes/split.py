"""split: run each call on parts of its operands, one for each rank of a mesh axis (Shoeybi et al. 2019, and beyond).

Which calls run on parts, and along which of their dimensions, is an exact choice: that of least communication and work
(`graphopt.cost.splitting`) among all that the signatures of the operators allow (`graphopt.dimensions`).
"""

import logging
from dataclasses import dataclass

from graphopt.cost.splitting import Choice, best_choice
from graphopt.dimensions.forms import REPLICATED, Form, Part
from graphopt.dimensions.space import space_of, unsigned
from graphopt.errors import PassError
from graphopt.ir import InputKind, Level, OutputKind, Program, Split
from graphopt.nearest import nearest
from graphopt.passes.base import Pass, PassContext, Tier
from graphopt.passes.rewrite import remove_dead
from graphopt.passes.split_order import choose_order
from graphopt.passes.split_rewrite import rewrite
from graphopt.passes.split_rules import ExpertRules, Rules, SequenceRules, WeightRules
from graphopt.passes.split_styles import Style, keep_styled

log = logging.getLogger(__name__)
ALONG = ("weights", "sequence", "heads", "experts")


@dataclass(frozen=True)
class SplitOptions:
    """axis: of the mesh.

    along: ``weights``, their columns and rows (Shoeybi et al. 2019), ``sequence``, ``heads``: the sequence, and in
        attention its heads (Jacobs et al. 2023), or ``experts``: the batch, and of products by group the groups, to
        which tokens are dispatched (Lepikhin et al. 2020).
    sequence: between products whose weights are split, along the sequence (Korthikanti et al. 2022).
    column, row, whole: patterns of modules, joined by ``|``, whose products are to be split in that style.
    likely_column, likely_row: those that are followed where that can be.
    capacity: for how many rows a rank has room that are dispatched to it, as a multiple of those that it sends; 0 for
        all there are.
    gather_outputs: whether each rank returns all of what the model does; else, in training, parts of what no gradient
        arrives at.
    """

    axis: str = "tp"
    along: str = "weights"
    sequence: bool = False
    column: str = ""
    row: str = ""
    whole: str = ""
    likely_column: str = ""
    likely_row: str = ""
    capacity: float = 0.0
    gather_outputs: bool = True

    def __post_init__(self) -> None:
        if self.along not in ALONG:
            raise PassError(f"split: along={self.along} is not one of {', '.join(ALONG)}; {nearest(self.along, ALONG)}")

    @property
    def patterns(self) -> dict[str, Style]:
        """The style of each pattern. Raises PassError for one that is given two."""
        found: dict[str, Style] = {}
        for style in Style:
            for pattern in _listed(getattr(self, style.value)):
                if pattern in found:
                    raise PassError(f"split: {pattern!r} is to be {found[pattern].value} and {style.value}; say one")
                found[pattern] = style
        return found

    @property
    def likely(self) -> dict[str, Style]:
        """The style of each pattern that need not be followed."""
        columns, rows = _listed(self.likely_column), _listed(self.likely_row)
        return dict.fromkeys(columns, Style.COLUMN) | dict.fromkeys(rows, Style.ROW)


def _listed(patterns: str) -> list[str]:
    return [pattern for pattern in patterns.split("|") if pattern]


class SplitAlong(Pass):
    """Split products along dimensions of their weights, and what is between them as it comes cheapest."""

    name = "split"
    Options = SplitOptions
    level = Level.FORWARD
    produces = Level.FORWARD
    requires = frozenset({"canonicalize"})
    tier = Tier.REASSOCIATES

    def run(self, program: Program, context: PassContext) -> bool:
        axis = self.options.axis
        if axis not in context.mesh:
            raise PassError(f"split: the mesh has no axis {axis!r}; {nearest(axis, context.mesh)}")
        ranks = context.mesh[axis]
        if ranks == 1:
            return False
        order = None
        if self.options.along == "sequence":
            order, context.statistics["order"] = choose_order(program, ranks)
        rules = self._rules(program, ranks)
        lying = _lying(program, context, axis) | dict.fromkeys(rules.whole_parameters, REPLICATED)
        room = min(self.options.capacity or ranks, ranks) if rules.dispatches else None
        space = space_of(program, ranks, rules.may_cut, lying, order=order, room=room)
        styled = keep_styled(space, rules.classes, self.options.patterns, strict=True)
        styled += keep_styled(space, rules.classes, self.options.likely, strict=False)
        may_lie = () if self.options.gather_outputs else _without_gradient(program, context)
        choice = best_choice(program, space, context.hardware, axis, rules.is_wanted, may_lie)
        products = [strategy for node, strategy in choice.strategies.items() if node in rules.products]
        count = sum(strategy.cut is not None for strategy in products)
        if not count:
            raise PassError(
                f"split: nothing can be split over the {ranks} ranks of {axis}: along {self.options.along}, none "
                f"of the {len(products)} {rules.of_interest} can run on {ranks} parts; choose {axis}={rules.most_ranks}"
            )
        _set_layouts(program, context, axis, choice)
        moved = rewrite(program, context, space, choice, axis, self.name)
        remove_dead(program)
        context.statistics.update(products=len(products), split=count, styled=styled, **moved)
        if unknown := ", ".join(unsigned(space)):
            log.warning("split: every rank of %s runs %s whole: no signature says how it could be split", axis, unknown)
            context.statistics.update(replicated=unknown)
        return True

    def _rules(self, program: Program, ranks: int) -> Rules:
        if self.options.along == "weights":
            return WeightRules(program, ranks, self.options.sequence)
        if self.options.along == "experts":
            return ExpertRules(program, ranks)
        return SequenceRules(program, ranks, self.options.along == "heads")


def _lying(program: Program, context: PassContext, axis: str) -> dict[str, Form]:
    """How the parameters lie over the axis, if that is decided."""
    if context.decided is None:
        return {}
    found: dict[str, Form] = {}
    for role, node in program.nodes_of(InputKind.PARAMETER):
        split = next((split for split in context.decided[role.name].splits if split.axis == axis), None)
        size = node.meta["val"].shape[split.dim] if split is not None else 0
        found[role.name] = REPLICATED if split is None else Part(split.dim, 1, size // split.ranks)
    return found


def _without_gradient(program: Program, context: PassContext) -> list[int]:
    """The user outputs, by number, at which no gradient arrives in a step that trains."""
    if not context.gradient_outputs:
        return []
    users = [(index, role.name) for index, role in enumerate(program.outputs) if role.kind is OutputKind.USER]
    return [index for index, name in users if name not in context.gradient_outputs]


def _set_layouts(program: Program, context: PassContext, axis: str, choice: Choice) -> None:
    """Have each parameter lie as chosen."""
    for role, node in program.nodes_of(InputKind.PARAMETER):
        form = choice.inputs[node]
        if isinstance(form, Part):
            layout = context.layouts[role.name]
            split = Split(axis, context.mesh[axis], form.dim)
            context.layouts[role.name] = layout.split_over(*layout.splits, split)
