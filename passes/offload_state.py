"""offload_state: keep parameters and their gradients on the host or on disk (ZeRO-Infinity: Rajbhandari et al. 2021).

A parameter, or this rank's shard of it, comes in before it is first read in each direction and is dropped after the
last time; a gradient leaves once it is complete. It runs behind what gathers and reduces them.
"""

from dataclasses import dataclass

from torch import fx

from graphopt.errors import PassError
from graphopt.ir import InputKind, Level, OutputKind, Phase, Program, annotate, explain, facts_of
from graphopt.ir.copies import PLACES
from graphopt.ir.values import byte_size, is_dense
from graphopt.nearest import nearest
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.build import Builder
from graphopt.passes.elsewhere import bring_back, frees_memory, send_away
from graphopt.passes.repeat import made_of, repeat_in_backward


@dataclass(frozen=True)
class OffloadStateOptions:
    """place: ``host`` or ``disk``. least_bytes: smaller parameters, as a rank holds them, stay with their gradients."""

    place: str = "host"
    least_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise PassError(f"offload_state: there is no place {self.place!r}; {nearest(self.place, PLACES)}")


class OffloadState(Pass):
    """Copy parameters in, and gradients out."""

    name = "offload_state"
    Options = OffloadStateOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"offload_state", "overlap"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        builder = Builder(program, context, self.name)
        place = self.options.place
        chosen = {
            node: role.name
            for role, node in program.nodes_of(InputKind.PARAMETER, InputKind.SHARD)
            if _readers(node) and self._is_large(node)
        }
        made = made_of(program, chosen)
        repeat_in_backward(builder, made, "made of weights alone, so it is made again when they are back")
        for node in chosen:
            self._bring(builder, node)
            annotate(node, outside=frees_memory(place, context.hardware))
        moved = set(chosen.values())
        gradients = self._send_gradients(builder, moved) if context.reduce_gradients else 0
        context.statistics.update(parameters=len(moved), gradients=gradients)
        return bool(moved)

    def _is_large(self, node: fx.Node) -> bool:
        """Whether it is worth a copy; one of elements that lie apart would be another tensor."""
        value = node.meta["val"]
        return byte_size(value) >= max(1, self.options.least_bytes) and is_dense(value)

    def _bring(self, builder: Builder, parameter: fx.Node) -> None:
        """Have each direction read a copy of its own."""
        readers = _readers(parameter)
        for phase in Phase:
            own = [reader for reader in readers if facts_of(reader).phase is phase]
            if own:
                with builder.before(own[0]):
                    value = bring_back(builder, parameter, self.options.place, like=parameter, phase=phase)
                explain(value, self.name, f"comes from {self.options.place} for {phase.value}, and is dropped after it")
                for reader in own:
                    reader.replace_input_with(parameter, value)

    def _send_gradients(self, builder: Builder, names: set[str]) -> int:
        """The gradients of these parameters stay elsewhere."""
        program = builder.program
        results = list(program.results)
        count = 0
        for index, (role, gradient) in enumerate(zip(program.outputs, program.results, strict=True)):
            is_of_these = role.kind is OutputKind.GRADIENT and role.name in names
            if is_of_these and gradient is not None and self._is_large(gradient):
                results[index] = kept = send_away(builder, gradient, self.options.place)
                explain(kept, self.name, f"the gradient goes to {self.options.place}, as its parameter")
                count += 1
        program.set_results(results, program.outputs)
        return count


def _readers(parameter: fx.Node) -> list[fx.Node]:
    return sorted(user for user in parameter.users if user.op == "call_function")
