"""Emitted halves <-> autograd: `loss.backward()` runs the backward half, gradients arrive as the parameters are."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt._torch import keeps_graph, local_tensor
from graphopt.emit.module import EmittedFunction
from graphopt.emit.split import Halves
from graphopt.errors import GraphoptError
from graphopt.ir import Effect, Input, InputKind, Output, OutputKind, effect_of
from graphopt.runtime.parameters import gradient_for
from graphopt.runtime.random import GeneratorState, rank_generator
from graphopt.runtime.state import Runtime

Gradients = dict[Output, torch.Tensor]


@dataclass
class Executable:
    """Two emitted functions with what their inputs and outputs are.

    unreduced: makes the backward half that leaves gradients whole and unreduced.
    seeded: for each user output, whether the backward half expects a gradient at it.
    rank, ranks: place along the data-parallel axis, which decides the random stream.
    """

    halves: Halves
    forward: EmittedFunction
    backward: EmittedFunction | None
    unreduced: Callable[[], EmittedFunction]
    runtime: Runtime
    batch_names: list[str]
    seeded: tuple[bool, ...]
    rank: int
    ranks: int
    device: torch.device

    def __post_init__(self) -> None:
        program = self.halves.forward
        self.is_random = any(effect_of(node) is Effect.RANDOM for node in program.compute_nodes())
        self.updated = [role.name for role in program.outputs if role.kind is OutputKind.BUFFER]
        self.position = {name: index for index, name in enumerate(self.batch_names)}
        self.user_outputs = [role for role in program.outputs if role.kind is OutputKind.USER]
        backward = self.halves.backward
        self.gradients = list(backward.outputs) if backward else []
        kinds = (InputKind.SAVED, InputKind.TANGENT)
        self.kept_roles = [role for role in backward.inputs if role.kind not in kinds] if backward else []

    def stored_parameters(self) -> list[torch.Tensor]:
        """What the parameters of the forward half are stored in."""
        kinds = (InputKind.PARAMETER, InputKind.SHARD)
        names = (role.name for role in self.halves.forward.inputs if role.kind in kinds)
        return [local_tensor(self.runtime.slots[name].get()) for name in names]

    def inputs(self, batch: list[torch.Tensor], roles: list[Input]) -> list[Any]:
        """Values for the roles that are neither saved nor tangents."""
        return [self._input(batch, role) for role in roles]

    def _input(self, batch: list[torch.Tensor], role: Input) -> torch.Tensor:
        if role.kind is InputKind.BATCH:
            return batch[self.position[role.name]].detach()
        if role.kind is InputKind.CONSTANT:
            return self.halves.forward.constants[role.name]
        return self.runtime.value_of(role)

    def run_forward(self, batch: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
        """User outputs and saved values. Buffers that forward updates are written."""
        values = self.inputs(batch, self.halves.forward.inputs)
        self.runtime.calls += 1
        generator = rank_generator(self.rank, self.ranks if self.is_random else 1, self.device)
        with self.runtime.watching(), generator:
            results = self.forward(values, self.runtime)
        updates = results[: len(self.updated)]
        for name, value in zip(self.updated, updates, strict=True):
            self.runtime.slots[name].get().copy_(value)
        users = results[len(self.updated) : len(self.updated) + len(self.user_outputs)]
        return users, results[len(self.updated) + len(self.user_outputs) :]


@dataclass
class Invocation:
    """One call on its way through autograd.

    respecialize: (seeded outputs) -> an executable for exactly those, for a backward that was not foreseen.
    run_backward: (executable, inputs of its backward half) -> the gradients that autograd is to add up.
    """

    executable: Executable
    batch: list[torch.Tensor]
    respecialize: Callable[[tuple[bool, ...]], Executable]
    run_backward: Callable[[Executable, list[Any]], Gradients]
    generator: GeneratorState | None = None
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    watched_at: list[int] = field(default_factory=list)
    saved: list[Any] | None = None

    def forward(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """User outputs, and the tensors that autograd must watch for changes in place until backward has read them."""
        executable = self.executable
        if executable.is_random:
            self.generator = GeneratorState(executable.device)
        self.buffers = self._updated_buffers()
        kept = executable.inputs(self.batch, executable.kept_roles)
        for index, role in enumerate(executable.kept_roles):
            if role.name in executable.updated:
                kept[index] = self.buffers[role.name]
        users, saved = executable.run_forward(self.batch)
        values = [*kept, *saved]
        returned = {id(user) for user in users}
        self.watched_at = [
            index
            for index, value in enumerate(values)
            if id(value) in returned
            or (index < len(kept) and executable.kept_roles[index].name not in executable.updated)
        ]
        watched = [values[index] for index in self.watched_at]
        for index in self.watched_at:
            values[index] = None
        self.saved = values
        return users, watched + executable.stored_parameters()

    def backward(self, watched: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor | None]) -> Gradients:
        """Gradients for the tangents that arrived."""
        given = tuple(tangent is not None for tangent in tangents)
        for role, is_given in zip(self.executable.user_outputs, given, strict=True):
            if is_given and role.splits:
                raise GraphoptError(
                    f"a gradient arrives at output {role.name}, of which each rank returned a part because none was "
                    "expected there; say tensor.gather_outputs=true"
                )
        if given != self.executable.seeded:
            return self._replay(given, tangents)
        if self.saved is None:
            raise RuntimeError(
                "backward a second time: the saved values are freed; call backward(retain_graph=True) first"
            )
        values = list(self.saved)
        if not keeps_graph():
            self.saved = None
        for index, value in zip(self.watched_at, watched, strict=False):
            values[index] = value
        values.extend(tangent for tangent in tangents if tangent is not None)
        with self.executable.runtime.watching():
            return self.run_backward(self.executable, values)

    def _replay(self, given: tuple[bool, ...], tangents: Sequence[torch.Tensor | None]) -> Gradients:
        """Run forward once more, from the same buffers and random numbers, for the gradients that did arrive."""
        executable = self.respecialize(given)
        again = Invocation(executable, self.batch, self.respecialize, self.run_backward)
        now = self._updated_buffers()
        self._write_buffers(self.buffers)
        with self.generator.replayed() if self.generator is not None else contextlib.nullcontext():
            _, watched = again.forward()
        self._write_buffers(now)
        return again.backward(watched, tangents)

    def _updated_buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers that forward updates."""
        slots = self.executable.runtime.slots
        return {name: slots[name].get().clone() for name in self.executable.updated}

    def _write_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.executable.runtime.slots[name].get().copy_(value)


class _Bridge(torch.autograd.Function):
    """The node that autograd sees: user outputs out, gradients of parameters and batch tensors back."""

    @staticmethod
    def forward(ctx: Any, invocation: Invocation, *differentiable: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, watched = invocation.forward()
        ctx.invocation = invocation
        ctx.differentiable = differentiable
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*watched)
        roles = invocation.executable.user_outputs
        ctx.mark_non_differentiable(*(o for o, role in zip(outputs, roles, strict=True) if not role.requires_grad))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[Any, ...]:
        executable = ctx.invocation.executable
        gradients = ctx.invocation.backward(ctx.saved_tensors, tangents)
        wrapped = []
        for role, tensor in zip(executable.gradients, ctx.differentiable, strict=True):
            gradient = gradients.get(role)
            if gradient is not None and role.kind is OutputKind.GRADIENT:
                gradient = gradient_for(tensor, gradient, executable.runtime.layout_of(role.name))
            wrapped.append(gradient)
        return (None, *wrapped)


def call_with_autograd(invocation: Invocation) -> tuple[torch.Tensor, ...]:
    """Run an invocation so that autograd can come back to it."""
    executable = invocation.executable
    sources = [
        invocation.batch[executable.position[role.name]]
        if role.kind is OutputKind.BATCH_GRADIENT
        else executable.runtime.slots[role.name].get()
        for role in executable.gradients
    ]
    outputs = _Bridge.apply(invocation, *sources)  # type: ignore[no-untyped-call]
    assert isinstance(outputs, tuple)
    return outputs
