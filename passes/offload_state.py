"""offload_state: keep parameters and their gradients on the host or on disk (ZeRO-Infinity: Rajbhandari et al. 2021).

A parameter, or this rank's shard of it, comes in before it is first read in each direction and is dropped after the
last time; a gradient leaves once it is complete. It runs behind what gathers and reduces them.
"""

from dataclasses import dataclass

from torch import fx

from graphopt.ir import InputKind, Level, OutputKind, Phase, Program, annotate, explain, facts_of
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.build import Builder
from graphopt.passes.elsewhere import bring_back, check_place, frees_memory, is_worth_moving, send_away
from graphopt.passes.repeat import made_of, repeat_in_backward


@dataclass(frozen=True)
class OffloadStateOptions:
    """place: ``host`` or ``disk``. least_bytes: smaller parameters, as a rank holds them, stay with their gradients."""

    place: str = "host"
    least_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        check_place("offload_state", self.place)


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
        place, least_bytes = self.options.place, self.options.least_bytes
        chosen = {
            node: role.name
            for role, node in program.nodes_of(InputKind.PARAMETER, InputKind.SHARD)
            if _readers(node) and is_worth_moving(node.meta["val"], least_bytes)
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
        place, least_bytes = self.options.place, self.options.least_bytes
        results = list(program.results)
        count = 0
        for index, (role, gradient) in enumerate(zip(program.outputs, program.results, strict=True)):
            is_of_these = role.kind is OutputKind.GRADIENT and role.name in names
            if is_of_these and gradient is not None and is_worth_moving(gradient.meta["val"], least_bytes):
                results[index] = kept = send_away(builder, gradient, place)
                explain(kept, self.name, f"the gradient goes to {place}, as its parameter")
                count += 1
        program.set_results(results, program.outputs)
        return count


def _readers(parameter: fx.Node) -> list[fx.Node]:
    return sorted(user for user in parameter.users if user.op == "call_function")
