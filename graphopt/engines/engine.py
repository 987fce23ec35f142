"""The call that `graphopt.compile` installs: finds or makes the program for a call, and runs it."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from graphopt.capture.arguments import CallSpec, flatten_call
from graphopt.capture.call import Loss, StepCall, loss_of
from graphopt.capture.guards import AttributeGuard, CallKey, ModelState, ShapeGuard
from graphopt.capture.surroundings import Surroundings
from graphopt.emit.bridge import Executable, Gradients, Invocation, call_with_autograd
from graphopt.engines.microbatches import joined, microbatches
from graphopt.engines.whole import Whole
from graphopt.errors import CaptureError, GraphoptError
from graphopt.ir import OutputKind, ParameterLayout
from graphopt.plan import Plan
from graphopt.report import Report
from graphopt.runtime.agreement import Statement, agree, failing_together
from graphopt.runtime.clipping import clip_grad_norm_
from graphopt.runtime.outputs import put_together
from graphopt.runtime.parameters import whole_parameters
from graphopt.runtime.reduction import UnreducedGradients, reduce_gradients
from graphopt.runtime.state import Runtime

log = logging.getLogger("graphopt")


@dataclass
class Specialization:
    """A program made for calls of one key.

    collectives: what it exchanges with other ranks, a line for each call, in order.
    layouts: how it takes parameters to lie over the ranks.
    variants: the same call specialized to gradients at other outputs, by which.
    """

    executable: Executable
    report: Report
    attributes: AttributeGuard
    shapes: ShapeGuard
    surroundings: Surroundings
    template: Any
    collectives: str
    layouts: Mapping[str, ParameterLayout]
    variants: dict[tuple[bool, ...], "Specialization"] = field(default_factory=dict)


Specialize = Callable[[tuple[Any, ...], dict[str, Any], tuple[bool, ...] | None], Specialization]


class Engine:
    """A compiled model's call.

    specialize: compiles a call (args, kwargs, seeded outputs or None to predict them). settle: has the parameters lie
    as the first compilation took them to, if that is left to it.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        runtime: Runtime,
        mesh: DeviceMesh | None,
        specialize: Specialize,
        settle: Callable[[Mapping[str, ParameterLayout]], None],
        loss: Loss | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.runtime = runtime
        self.report: Report | None = None
        self.synchronizes = True
        self.loss = loss
        self._mesh = mesh
        self._group = None if mesh is None else dist.group.WORLD
        self._specialize = specialize
        self._settle = settle
        self._state = ModelState(model)
        self._specializations: dict[CallKey, list[Specialization]] = {}
        self._agreed: set[str] = set()
        self._said: set[str] = set()
        self._unreduced = UnreducedGradients()
        self._whole = Whole(model, runtime, functools.partial(whole_parameters, model) if mesh else dict)
        self._last: Specialization | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._whole.is_open or torch.compiler.is_exporting():
            return self._whole.call(*args, **kwargs)
        self.runtime.require_values()
        try:
            tensors, spec = flatten_call(args, kwargs)
        except CaptureError as error:
            if torch.is_grad_enabled():
                raise
            self._say(f"{error}; this call runs uncompiled with its parameters gathered")
            with self.gathered():
                return self._whole.call(*args, **kwargs)
        if self.plan.precision is not None:
            dtype = self.plan.precision.compute_dtype
            tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
            args, kwargs = spec.rebuild(tensors)
        chosen = self._find(args, kwargs, tensors, spec)
        if chosen is not self._last:
            self.runtime.resident.invalidate()
            self._last = chosen
        return chosen.template.build(self._run(chosen, args, kwargs, tensors))

    def train_step(self, batch: Any, target: Any = None) -> torch.Tensor:
        """Forward and backward of a batch, in as many microbatches as the plan says, whose gradients are added up.

        Returns the mean loss. Raises PlanError if the batch has fewer rows than there are microbatches, GraphoptError
        if the model returns no loss.
        """
        call = StepCall.of(batch, target, self.loss)
        parts = microbatches(call.tensors, self.plan.microbatches)
        losses = []
        for index, part in enumerate(parts):
            with self.no_sync() if index < len(parts) - 1 else contextlib.nullcontext(), torch.enable_grad():
                loss = loss_of(call.with_tensors(part.tensors).run(self.model))
                (loss * part.share).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return joined(losses, parts)

    def eval_step(self, batch: Any, target: Any = None) -> Any:
        """What the model returns for a batch, or its loss for a target, without gradients."""
        with torch.no_grad():
            return StepCall.of(batch, target, self.loss).run(self.model)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile for such a call now."""
        tensors, spec = flatten_call(args, kwargs)
        self._find(args, kwargs, tensors, spec)

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor], spec: CallSpec
    ) -> Specialization:
        key = self._state.key(spec, tensors)
        known = self._specializations.setdefault(key, [])
        reasons = []
        for candidate in known:
            reason = candidate.attributes.broken() or candidate.shapes.broken(tensors)
            if reason is None:
                self.report = candidate.report
                return candidate
            reasons.append(reason)
        if reasons:
            self._say(f"recompiling: {reasons[-1]}")
        made = self._compiled(args, kwargs, None)
        known.append(made)
        return made

    def _compiled(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], seeded: tuple[bool, ...] | None
    ) -> Specialization:
        """Compile, and make sure that all ranks go on together, with the same collectives."""
        with contextlib.nullcontext() if self._agreed else failing_together(self._group):
            made = self._specialize(args, kwargs, seeded)
        if made.collectives not in self._agreed:
            agree(Statement({"program": made.collectives}), self._group)
            self._agreed.add(made.collectives)
        if self.runtime.layouts is None:
            agree(Statement({"layouts": "\n".join(map(str, made.layouts.values()))}), self._group)
            self._settle(made.layouts)
        self.report = made.report
        return made

    def _run(
        self, chosen: Specialization, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> Any:
        executable = chosen.executable
        if executable.backward is None:
            with torch.no_grad():
                return self._returned(executable.run_forward(tensors)[0], executable)

        def respecialize(seeded: tuple[bool, ...]) -> Executable:
            if seeded not in chosen.variants:
                self._say(
                    f"recompiling: gradients arrived at outputs {_numbers(seeded)}, not {_numbers(executable.seeded)}"
                )
                with chosen.surroundings.restored():
                    chosen.variants[seeded] = self._compiled(args, kwargs, seeded)
            better = chosen.variants[seeded]
            chosen.executable, chosen.report = better.executable, better.report
            return better.executable

        values = call_with_autograd(Invocation(executable, tensors, respecialize, self._backward))
        return self._returned(values, executable)

    def _returned(self, values: Sequence[torch.Tensor], executable: Executable) -> Sequence[torch.Tensor]:
        return put_together(values, executable.user_outputs, self._mesh)

    def _backward(self, ran: Executable, values: list[Any]) -> Gradients:
        """Run a backward half; inside `no_sync` its gradients are kept back, to be reduced with those after it."""
        if self.synchronizes:
            self.runtime.resident.invalidate()
        if self.plan.data_parallel_ranks == 1 or (self.synchronizes and not self._unreduced):
            assert ran.backward is not None
            return _named(ran, ran.backward(values, self.runtime))
        gradients = _named(ran, ran.unreduced()(values, self.runtime))
        parameters = {role.name: role for role in gradients if role.kind is OutputKind.GRADIENT}
        self._unreduced.add({name: gradients.pop(role) for name, role in parameters.items()})
        if self.synchronizes:
            assert self.runtime.layouts is not None
            reduced = reduce_gradients(self._unreduced.take(), self.runtime.layouts, self.runtime.collectives)
            roles = {role.name: role for role in ran.gradients if role.kind is OutputKind.GRADIENT}
            gradients.update({roles[name]: gradient for name, gradient in reduced.items()})
        return gradients

    def last_report(self) -> Report:
        if self.report is None:
            raise GraphoptError(
                "nothing is compiled yet: call the model once, or give example_inputs to graphopt.compile"
            )
        return self.report

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.synchronizes = self.synchronizes, False
        try:
            yield
        finally:
            self.synchronizes = before

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Parameters whole and plain, calls uncompiled, until the context ends."""
        return self._whole.opened()

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        device = self.runtime.collectives.device
        return clip_grad_norm_(
            self.model, max_norm, norm_type, error_if_nonfinite, lambda name: True, self._group, device
        )

    def gather_during(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method` of the model with its parameters gathered while it runs: it calls the model in ways of its own."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._say(f"{method.__name__} runs uncompiled, with its parameters gathered")
            with self.gathered():
                return method(*args, **kwargs)

        return call

    def _say(self, message: str) -> None:
        """Log a fallback or a recompilation, once."""
        if message not in self._said:
            self._said.add(message)
            log.warning("%s: %s", type(self.model).__name__, message)


def _named(executable: Executable, results: list[Any]) -> Gradients:
    return {role: value for role, value in zip(executable.gradients, results, strict=True) if value is not None}


def _numbers(seeded: tuple[bool, ...]) -> list[int]:
    return [index for index, flag in enumerate(seeded) if flag]
