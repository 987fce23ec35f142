"""offload: keep what forward saves for backward on the host or on disk (Rhu et al., "vDNN", 2016; ZeRO-Infinity, 2021).

Each value leaves once it is made and comes back before backward reads it. Which values are worth it for a budget of
memory, `rematerialize` decides; this moves all of at least a size.
"""

from dataclasses import dataclass

from graphopt.ir import Level, Phase, Program
from graphopt.ir.values import byte_size
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.build import Builder
from graphopt.passes.elsewhere import check_place, keep_elsewhere, movable


@dataclass(frozen=True)
class OffloadOptions:
    """place: ``host`` or ``disk``. least_bytes: smaller values stay."""

    place: str = "host"
    least_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        check_place("offload", self.place)


class Offload(Pass):
    """Copy saved values out in forward, and back in backward."""

    name = "offload"
    Options = OffloadOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"offload", "zero", "offload_state", "overlap"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        if not program.compute_nodes(Phase.BACKWARD):
            return False
        place = self.options.place
        values = movable(program, self.options.least_bytes)
        reason = f"waits for backward on {place}, and takes no memory here"
        moved = keep_elsewhere(Builder(program, context, self.name), values, place, reason)
        context.statistics.update(moved=len(moved), moved_bytes=sum(byte_size(node.meta["val"]) for node in moved))
        return bool(moved)
