"""One stage of a pipeline as it runs: emitted functions, and what a microbatch leaves between them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphopt.emit.module import EmittedFunction
from graphopt.ir import Effect, Input, InputKind, OutputKind, Program, effect_of
from graphopt.ir.liveness import own_results
from graphopt.runtime.messages import TensorSpec
from graphopt.runtime.random import rank_generator
from graphopt.runtime.reduction import UnreducedGradients
from graphopt.runtime.state import Runtime
from graphopt.schedules import Work

FORWARD, BACKWARD, INPUT_GRADIENTS, WEIGHT_GRADIENTS = "forward", "backward", "input_gradients", "weight_gradients"
# The parts that may run behind each, on the same microbatch.
_BEHIND = {
    FORWARD: (BACKWARD, INPUT_GRADIENTS, WEIGHT_GRADIENTS),
    BACKWARD: (),
    INPUT_GRADIENTS: (WEIGHT_GRADIENTS,),
    WEIGHT_GRADIENTS: (),
}
_WORKS = {
    Work.FORWARD: FORWARD,
    Work.BACKWARD: BACKWARD,
    Work.INPUT_GRADIENT: INPUT_GRADIENTS,
    Work.WEIGHT_GRADIENT: WEIGHT_GRADIENTS,
}
_Key = tuple[InputKind, str]


@dataclass
class StageProgram:
    """A stage for microbatches of one shape.

    parts: the programs of its forward, and of its backward, whole or in two; functions: those, emitted. received,
    sent: what crosses before and behind it, in order, and whether a gradient comes back. rank, ranks: place along the
    data-parallel axis, which decides the random stream.
    """

    parts: Mapping[str, Program]
    functions: Mapping[str, EmittedFunction]
    received: Sequence["Crossing"]
    sent: Sequence["Crossing"]
    runtime: Runtime
    rank: int
    ranks: int
    device: torch.device

    def __post_init__(self) -> None:
        forward = self.parts[FORWARD]
        self.is_random = any(effect_of(node) is Effect.RANDOM for node in forward.compute_nodes())
        self.updated = {role.name for role in forward.outputs if role.kind is OutputKind.BUFFER}
        self.own_gradients = {name: _own_gradients(part) for name, part in self.parts.items()}
        self.user_outputs = [role.name for role in forward.outputs if role.kind is OutputKind.USER]

    @property
    def by_work(self) -> dict[Work, Program]:
        """The parts, by what a schedule calls them."""
        return {work: self.parts[name] for work, name in _WORKS.items() if name in self.parts}


@dataclass(frozen=True)
class Crossing:
    """A value between two stages."""

    name: str
    spec: TensorSpec
    has_gradient: bool


@dataclass
class Microbatch:
    """Its tensors by name, and the gradients that arrive at the outputs of the model, by name."""

    batch: Mapping[str, torch.Tensor]
    tangents: Mapping[str, torch.Tensor] = field(default_factory=dict)


class StageRun:
    """A stage through the microbatches of one step; see `graphopt.runtime.stages.Stage`.

    outputs: of the model, of each microbatch, those that are wanted of this stage. gradients: of parameters, added up.
    """

    def __init__(
        self, programs: Sequence[StageProgram], microbatches: Sequence[Microbatch], wanted: Collection[str]
    ) -> None:
        """programs: for each microbatch. wanted: names of outputs; what is not wanted is let go."""
        self._programs = programs
        self._microbatches = microbatches
        self._wanted = wanted
        self._kept: dict[int, dict[_Key, torch.Tensor]] = {}
        self.outputs: dict[int, dict[str, torch.Tensor]] = {}
        self.gradients = UnreducedGradients()

    def forward(self, microbatch: int, received: list[torch.Tensor]) -> list[torch.Tensor]:
        program = self._programs[microbatch]
        runtime = program.runtime
        kept: dict[_Key, torch.Tensor] = {
            (InputKind.RECEIVED, crossing.name): value
            for crossing, value in zip(program.received, received, strict=True)
        }
        received.clear()  # how long each lives is decided here
        for name in program.updated if len(program.parts) > 1 else ():
            kept[InputKind.BUFFER, name] = runtime.slots[name].get().clone()  # backward reads what forward read
        self._kept[microbatch] = kept
        found = self._run(FORWARD, microbatch)
        for name in program.updated:
            runtime.slots[name].get().copy_(found[OutputKind.BUFFER][name])
        self.outputs[microbatch] = {n: value for n, value in found[OutputKind.USER].items() if n in self._wanted}
        self._keep(microbatch, found[OutputKind.SAVED])
        return [found[OutputKind.SENT][crossing.name] for crossing in program.sent]

    def backward(self, microbatch: int, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        return self._backward(BACKWARD, microbatch, gradients)

    def input_gradients(self, microbatch: int, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        return self._backward(INPUT_GRADIENTS, microbatch, gradients)

    def weight_gradients(self, microbatch: int) -> None:
        gradients = self._run(WEIGHT_GRADIENTS, microbatch)[OutputKind.GRADIENT]
        self.gradients.add(gradients, self._programs[microbatch].own_gradients.get(WEIGHT_GRADIENTS, frozenset()))

    def incoming(self, microbatch: int) -> list[TensorSpec]:
        return [crossing.spec for crossing in self._programs[microbatch].received]

    def outgoing(self, microbatch: int) -> list[TensorSpec]:
        return [crossing.spec for crossing in self._programs[microbatch].sent]

    def incoming_gradients(self, microbatch: int) -> list[bool]:
        return [crossing.has_gradient for crossing in self._programs[microbatch].received]

    def outgoing_gradients(self, microbatch: int) -> list[bool]:
        return [crossing.has_gradient for crossing in self._programs[microbatch].sent]

    def _backward(self, part: str, microbatch: int, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        program, kept = self._programs[microbatch], self._kept[microbatch]
        kept.update(_tangents(program.sent, gradients))
        gradients.clear()
        tangents = self._microbatches[microbatch].tangents
        kept.update({(InputKind.TANGENT, name): tangent for name, tangent in tangents.items()})
        found = self._run(part, microbatch)
        self.gradients.add(found[OutputKind.GRADIENT], program.own_gradients.get(part, frozenset()))
        self._keep(microbatch, found[OutputKind.SAVED])
        returned = found[OutputKind.RECEIVED_GRADIENT]
        return [_or_zeros(returned.get(crossing.name), crossing, program.device) for crossing in program.received]

    def _keep(self, microbatch: int, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._kept[microbatch][InputKind.SAVED, name] = value

    def _run(self, part: str, microbatch: int) -> dict[OutputKind, dict[str, torch.Tensor]]:
        """The results of a part by kind and name; what no later part reads of a microbatch is let go.

        A stage that leads from nothing that is trained to the loss has no backward: there are none.
        """
        program, kept = self._programs[microbatch], self._kept[microbatch]
        found: dict[OutputKind, dict[str, torch.Tensor]] = {kind: {} for kind in OutputKind}
        if part not in program.parts:
            kept.clear()
            return found
        behind = [program.parts[name] for name in _BEHIND[part] if name in program.parts]
        later = {(role.kind, role.name) for each in behind for role in each.inputs}
        inputs = program.parts[part].inputs
        values = [self._value(program, microbatch, role, keep=(role.kind, role.name) in later) for role in inputs]
        for key in [key for key in kept if key not in later]:
            del kept[key]
        generator = rank_generator(program.rank, program.ranks if program.is_random else 1, program.device)
        with program.runtime.watching(), generator:
            results = program.functions[part](values, program.runtime)
        for role, value in zip(program.parts[part].outputs, results, strict=True):
            if value is not None:
                found[role.kind][role.name] = value
        return found

    def _value(self, program: StageProgram, microbatch: int, role: Input, keep: bool) -> torch.Tensor:
        kept = self._kept[microbatch]
        key = (role.kind, role.name)
        if key in kept:
            return kept[key] if keep else kept.pop(key)
        if role.kind is InputKind.BATCH:
            return self._microbatches[microbatch].batch[role.name]
        if role.kind is InputKind.CONSTANT:
            return program.parts[FORWARD].constants[role.name]
        return program.runtime.value_of(role)


def _own_gradients(part: Program) -> frozenset[str]:
    own = own_results(part)
    return frozenset(role.name for role, node in part.results_of(OutputKind.GRADIENT) if node in own)


def _tangents(sent: Sequence[Crossing], gradients: Sequence[torch.Tensor | None]) -> dict[_Key, torch.Tensor]:
    """By name, those that there are; behind the last stage there are none. (An open zip would hold on to the last.)"""
    pairs = zip(sent, gradients, strict=True) if gradients else ()
    return {(InputKind.TANGENT, crossing.name): value for crossing, value in pairs if value is not None}


def _or_zeros(gradient: torch.Tensor | None, crossing: Crossing, device: torch.device) -> torch.Tensor | None:
    """The gradient of a value that was received; zeros where nothing of the stage leads from it to the loss."""
    if not crossing.has_gradient:
        return None
    return gradient if gradient is not None else crossing.spec.empty(device).zero_()
