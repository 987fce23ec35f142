"""Programs split over an axis, run on all its ranks in this process, beside the model as it is."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.capture.arguments import flatten_call, tensor_names
from graphopt.capture.export import capture
from graphopt.cost.hardware import PRESETS
from graphopt.inspect.simulate import Simulation
from graphopt.ir import InputKind, OutputKind, ParameterLayout, Program
from graphopt.passes import REGISTRY
from graphopt.passes.base import PassContext
from graphopt.passes.pipeline import PassRecord, Pipeline


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

    def run(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and whole gradients. Raises AssertionError where ranks disagree on what each holds whole."""
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
            else:
                inputs.append([next(batch) if role.kind is InputKind.BATCH else torch.tensor(1.0)] * self.ranks)
        values = dict(zip(self.program.placeholders, inputs, strict=True))
        values |= dict(Simulation(self.program, {"tp": self.ranks}).run(inputs))
        users = [values[node] for _, node in self.program.results_of(OutputKind.USER) if node is not None]
        (loss,) = (value for value in users if value[0].dim() == 0)
        assert all(torch.equal(each, loss[0]) for each in loss)
        gradients = {}
        for role, node in self.program.results_of(OutputKind.GRADIENT):
            if node is not None:
                gradients[role.name] = _joined(values[node], self.layouts[role.name])
        return loss[0], gradients


def split_program(
    model: nn.Module, batch: dict[str, Any], ranks: int, options: str = "", hardware: str = "cpu"
) -> SplitProgram:
    """A model's step, split over `ranks` of `tp` and verified after each pass."""
    tensors, spec = flatten_call((), batch)
    captured = capture(model, tensors, spec, tensor_names(model.forward, (), batch))
    program = captured.program
    users = [node.meta["val"] for _, node in program.results_of(OutputKind.USER) if node is not None]
    layouts = {
        name: ParameterLayout.choose(name, tuple(p.shape), p.dtype, "dp", 1, True)
        for name, p in model.named_parameters()
    }
    context = PassContext(
        fake_mode=captured.fake_mode,
        mesh={"dp": 1, "tp": ranks},
        layouts=layouts,
        gradient_outputs=tuple(value.is_floating_point() and value.dim() == 0 for value in users),
        hardware=PRESETS[hardware],
    )
    pipeline = Pipeline.parse(f"canonicalize,split{{axis=tp{options}}},differentiate", REGISTRY)
    records = pipeline.run(program, context, verify=True)
    return SplitProgram(program, layouts, records, ranks, tensors, model)


def _joined(parts: list[torch.Tensor], layout: ParameterLayout) -> torch.Tensor:
    """The whole of what each rank has a part of, or of what all have."""
    if layout.splits:
        (split,) = layout.splits
        return torch.cat(parts, split.dim)
    assert all(torch.equal(part, parts[0]) for part in parts), f"{layout.name} differs between ranks"
    return parts[0]
