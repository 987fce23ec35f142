"""Programs split over an axis, run on all its ranks in this process, beside the model as it is."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.capture.arguments import flatten_call, tensor_names
from graphopt.capture.export import capture
from graphopt.capture.structure import take_apart
from graphopt.cost.hardware import PRESETS
from graphopt.inspect.simulate import SeededDraws, Simulation
from graphopt.ir import InputKind, Output, OutputKind, ParameterLayout, Program
from graphopt.passes import REGISTRY
from graphopt.passes.base import PassContext
from graphopt.passes.pipeline import PassRecord, Pipeline


@dataclass(frozen=True)
class Step:
    """users: what a model returns, in order. gradients: of parameters. buffers: those that change."""

    users: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]

    def distance(self, wanted: "Step") -> float:
        """The largest relative difference of an output or a buffer, or of all gradients taken as one vector."""
        pairs = [*zip(self.users, wanted.users, strict=True)]
        pairs += [(buffer, wanted.buffers[name]) for name, buffer in self.buffers.items()]
        pairs.append((_vector(self, wanted), _vector(wanted, wanted)))
        return max(_relative(*pair) for pair in pairs)


def eager_step(model: nn.Module, batch: dict[str, Any]) -> Step:
    """What the model itself does, with the numbers that a simulation draws."""
    model = copy.deepcopy(model)
    outputs: list[torch.Tensor] = []
    with SeededDraws(0):
        take_apart(model(**batch), outputs)
        losses = [output for output in outputs if _is_loss(output) and output.requires_grad]
        torch.stack([loss.double() for loss in losses]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Step([output.detach() for output in outputs], gradients, dict(model.named_buffers()))


@dataclass
class SplitProgram:
    """A step program for each rank of `tp`; layouts: how the parameters lie; records: of the passes."""

    program: Program
    layouts: dict[str, ParameterLayout]
    records: list[PassRecord]
    ranks: int
    batch: list[torch.Tensor]
    model: nn.Module

    @property
    def statistics(self) -> dict[str, Any]:
        """Of the pass `split`."""
        return next(record.statistics for record in self.records if record.name == "split")

    @property
    def calls(self) -> list[str]:
        """The operators of the program, in order."""
        return [str(node.target) for node in self.program.compute_nodes()]

    def run(self) -> Step:
        """Outputs, buffers and whole gradients. Raises AssertionError where ranks disagree on what each holds whole."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        batch = iter(self.batch)
        inputs: list[Any] = []
        for role in self.program.inputs:
            if role.kind is InputKind.PARAMETER:
                whole, layout = parameters[role.name].detach(), self.layouts[role.name]
                inputs.append([layout.part(whole, {"tp": rank}).contiguous() for rank in range(self.ranks)])
            elif role.kind is InputKind.BUFFER:
                inputs.append([parameters[role.name].clone() for _ in range(self.ranks)])
            elif role.kind is InputKind.CONSTANT:
                inputs.append([self.program.constants[role.name]] * self.ranks)
            elif role.kind is InputKind.BATCH:
                inputs.append([next(batch).detach()] * self.ranks)
            else:
                users = self.program.results_of(OutputKind.USER)
                (dtype,) = (
                    node.meta["val"].dtype for user, node in users if node is not None and user.name == role.name
                )
                inputs.append([torch.ones((), dtype=dtype)] * self.ranks)
        values = dict(zip(self.program.placeholders, inputs, strict=True))
        values |= dict(Simulation(self.program, {"dp": 1, "tp": self.ranks}).run(inputs))
        found: dict[OutputKind, dict[str, torch.Tensor]] = {kind: {} for kind in OutputKind}
        for output, node in zip(self.program.outputs, self.program.results, strict=True):
            if node is not None:
                layout = self.layouts.get(output.name) if output.kind is OutputKind.GRADIENT else None
                found[output.kind][output.name] = _joined(values[node], layout, output)
        users = list(found[OutputKind.USER].values())
        return Step(users, found[OutputKind.GRADIENT], found[OutputKind.BUFFER])


def split_program(
    model: nn.Module,
    batch: dict[str, Any],
    ranks: int,
    options: str = "",
    hardware: str = "cpu",
    axis: str = "tp",
    chunks: int = 1,
    fuse: str = "",
) -> SplitProgram:
    """A model's step, split over `ranks` of `tp` and verified after each pass.

    chunks: parts of the batch. fuse: whether operators with kernels are put in "before" it is split, "behind" or not.
    """
    tensors, spec = flatten_call((), batch)
    captured = capture(model, tensors, spec, tensor_names(model.forward, (), batch))
    program = captured.program
    losses = frozenset(
        role.name
        for role, node in program.results_of(OutputKind.USER)
        if node is not None and _is_loss(node.meta["val"])
    )
    layouts = {
        name: ParameterLayout.choose(name, tuple(p.shape), p.dtype, "dp", 1, True)
        for name, p in model.named_parameters()
    }
    context = PassContext(
        fake_mode=captured.fake_mode,
        mesh={"dp": 1, "tp": ranks},
        layouts=layouts,
        gradient_outputs=losses,
        hardware=PRESETS[hardware],
    )
    chunk, interleave = (f",chunk{{chunks={chunks}}}", ",interleave") if chunks > 1 else ("", "")
    before, behind = (",fuse" * (fuse == where) for where in ("before", "behind"))
    text = f"canonicalize{before},split{{axis={axis}{options}}}{chunk}{behind},differentiate{interleave}"
    pipeline = Pipeline.parse(text, REGISTRY)
    records = pipeline.run(program, context, verify=True)
    return SplitProgram(program, layouts, records, ranks, tensors, model)


def _is_loss(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.dim() == 0


def _joined(parts: list[torch.Tensor], layout: ParameterLayout | None, role: Output) -> torch.Tensor:
    """The whole of what each rank has a part of, or of what all have."""
    if layout is not None and layout.splits:
        (split,) = layout.splits
        return torch.cat(parts, split.dim)
    first = parts[0]
    assert all(torch.equal(part.nan_to_num(), first.nan_to_num()) for part in parts), f"{role} differs between ranks"
    return first


def _vector(step: Step, wanted: Step) -> torch.Tensor:
    """The gradients of all parameters that have one in `wanted`, where the step has none zeros."""
    found = [step.gradients.get(name, torch.zeros_like(like)) for name, like in wanted.gradients.items()]
    return torch.cat([gradient.reshape(-1).double() for gradient in found])


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    both_nan = one.isnan() & other.isnan()
    a, b = (tensor.double().masked_fill(both_nan, 0) for tensor in (one, other))
    size = float(b.norm())
    apart = float((a - b).norm())
    return apart / size if size > 0 else apart
