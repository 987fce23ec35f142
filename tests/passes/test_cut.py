"""Stages of a program, run one behind the other, are the program; each call is in one of them."""

import itertools
from typing import Any

import pytest
import torch
from torch import fx, nn

from graphopt.capture.arguments import flatten_call, tensor_names
from graphopt.capture.export import Capture, capture
from graphopt.cost.hardware import PRESETS
from graphopt.emit.split import Halves, split, split_backward
from graphopt.errors import PassError
from graphopt.ir import InputKind, OutputKind, ParameterLayout, Program
from graphopt.ir.snapshot import copied
from graphopt.passes import REGISTRY
from graphopt.passes.base import PassContext
from graphopt.passes.crossing import Row
from graphopt.passes.pipeline import PassRecord, Pipeline
from tests.support.unet import UNet, squared_error
from tests.support.zoo import ZOO, loss_of

Key = tuple[Any, str]


class UNetWithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return squared_error(self.net(x), y)


def model_of(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if name == "unet":
        return UNetWithLoss(), {"x": torch.randn(2, 3, 16, 16), "y": torch.randn(2, 3, 16, 16)}
    return ZOO[name].build().train(), ZOO[name].batch()


class Cutter:
    """A captured model, cut as often as one likes."""

    def __init__(self, name: str) -> None:
        self.model, self.batch = model_of(name)
        self.tensors, spec = flatten_call((), self.batch)
        names = tensor_names(self.model.forward, (), self.batch)
        self.captured: Capture = capture(self.model, self.tensors, spec, names)
        users = self.captured.program.results_of(OutputKind.USER)
        self.losses = frozenset(role.name for role, node in users if node is not None and node.meta["val"].dim() == 0)
        self.layouts: dict[str, ParameterLayout] = {}

    def stage(self, stages: int, stage: int, options: str = "", decided: Any = None) -> tuple[Program, PassRecord]:
        program = copied(self.captured.program)
        self.layouts = {
            name: ParameterLayout.choose(name, tuple(p.shape), p.dtype, "dp", 1, True)
            for name, p in self.model.named_parameters()
        }
        context = PassContext(
            self.captured.fake_mode,
            {"dp": 1, "pp": stages},
            self.layouts,
            decided=decided,
            gradient_outputs=self.losses,
            hardware=PRESETS["cpu"],
        )
        text = f"canonicalize,cut{{stages={stages},stage={stage}{options}}},differentiate"
        records = Pipeline.parse(text, REGISTRY).run(program, context, verify=True)
        return program, records[1]

    def values(self, program: Program, crossing: dict[Key, torch.Tensor]) -> list[torch.Tensor]:
        state = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        batch = dict(zip(self.captured.names, self.tensors, strict=True))
        found = []
        for role in program.inputs:
            if (role.kind, role.name) in crossing:
                found.append(crossing[role.kind, role.name])
            elif role.kind is InputKind.BATCH:
                found.append(batch[role.name])
            elif role.kind is InputKind.CONSTANT:
                found.append(program.constants[role.name])
            else:
                found.append(state[role.name].detach())
        return found


def run(cutter: Cutter, program: Program, crossing: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    results = fx.Interpreter(program.module).run(*cutter.values(program, crossing))
    pairs = zip(program.outputs, results, strict=True)
    return {(role.kind, role.name): value for role, value in pairs if value is not None}


def step(cutter: Cutter, stages: list[Halves], *, in_two: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of all stages, one behind the other, and back."""
    sent: dict[Key, torch.Tensor] = {}
    saved: list[dict[Key, torch.Tensor]] = []
    losses = []
    for halves in stages:
        received = {(InputKind.RECEIVED, name): value for (_, name), value in sent.items()}
        found = run(cutter, halves.forward, received)
        sent = {key: value for key, value in found.items() if key[0] is OutputKind.SENT}
        losses += [value for (kind, name), value in found.items() if kind is OutputKind.USER and name in cutter.losses]
        saved.append(received | {(InputKind.SAVED, n): v for (kind, n), v in found.items() if kind is OutputKind.SAVED})
    gradients: dict[str, torch.Tensor] = {}
    arrived = {(InputKind.TANGENT, name): torch.ones(()) for name in cutter.losses}
    for halves, kept in zip(reversed(stages), reversed(saved), strict=True):
        assert halves.backward is not None
        found = {}
        for part in split_backward(halves.backward) if in_two else [halves.backward]:
            found |= run(cutter, part, kept | arrived)
            kept |= {(InputKind.SAVED, n): v for (kind, n), v in found.items() if kind is OutputKind.SAVED}
        for (kind, name), value in found.items():
            if kind is OutputKind.GRADIENT:
                gradients[name] = gradients[name] + value if name in gradients else value
        arrived = {(InputKind.TANGENT, n): v for (k, n), v in found.items() if k is OutputKind.RECEIVED_GRADIENT}
    return losses[0], gradients


@pytest.mark.parametrize("in_two", [False, True])
@pytest.mark.parametrize(("name", "stages"), [("llama", 4), ("t5", 3), ("mixtral", 2), ("unet", 4), ("whisper", 3)])
def test_stages_one_behind_the_other_are_the_model(name: str, stages: int, in_two: bool) -> None:
    """Its loss bit for bit; its gradients to the order in which those of a value that is read twice are added."""
    cutter = Cutter(name)
    loss, gradients = step(cutter, [split(cutter.stage(stages, k)[0]) for k in range(stages)], in_two=in_two)
    eager = loss_of(cutter.model(**cutter.batch))
    eager.backward()
    assert torch.equal(loss, eager.detach())
    for parameter_name, parameter in cutter.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[parameter_name], parameter.grad, rtol=2e-6, atol=1e-7)


def test_each_call_is_in_one_stage_and_what_crosses_is_received_by_the_next() -> None:
    cutter = Cutter("t5")
    row = Row(copied(cutter.captured.program))
    programs = [cutter.stage(3, k) for k in range(3)]
    assert sum(map(int, programs[0][1].statistics["calls"].split("|"))) <= len(row.calls)
    for (before, _), (behind, _) in itertools.pairwise(programs):
        sent = [(role.name, role.requires_grad) for role, _ in before.results_of(OutputKind.SENT)]
        assert sent == [(role.name, role.requires_grad) for role, _ in behind.nodes_of(InputKind.RECEIVED)]


def test_what_is_made_of_the_batch_alone_does_not_cross() -> None:
    """Masks and positions: each stage makes them for itself. Over a cut between layers one hidden state goes."""
    cutter = Cutter("llama")
    program, _ = cutter.stage(2, 1, ",at=model.layers.1")
    (received,) = program.nodes_of(InputKind.RECEIVED)
    assert tuple(received[1].meta["val"].shape) == (8, 16, 64)


def test_a_parameter_that_two_stages_read_lies_on_both() -> None:
    cutter = Cutter("gpt2")
    cutter.stage(2, 0)
    assert cutter.layouts["transformer.wte.weight"].stages == (0, 1)
    assert cutter.layouts["transformer.wpe.weight"].stages == (0,)
    assert cutter.layouts["transformer.ln_f.weight"].stages == (1,)


def test_what_is_decided_stays_so() -> None:
    cutter = Cutter("llama")
    cutter.stage(3, 1, ",at=model.layers.0.mlp|model.layers.1.mlp")
    decided = dict(cutter.layouts)
    program, _ = cutter.stage(3, 1, decided=decided)
    assert cutter.layouts == decided
    names = {role.name for role, _ in program.nodes_of(InputKind.PARAMETER)}
    assert names == {name for name, layout in decided.items() if layout.stages == (1,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("stages=40", "40 stages are more than can be cut so that each has parameters; choose 21"),
        ("stages=2,stage=2", "there is no stage 2 of 2; they are 0 to 1"),
        ("stages=3,at=model.layers.1", "1 places leave 2 stages, not 3; name 2"),
        ("stages=2,at=model.layer.1", "no module 'model.layer.1' runs; .* 'model.layers.1'"),
        ("stages=3,at=model.layers.1|model.layers.0", "do not run in this order; sort them"),
        ("stages=2,at=model.layers.0.self_attn.o_proj,send_bytes=40000", "of a microbatch would cross; the nearest"),
        (
            "stages=3,at=model.layers.1.mlp.act_fn|model.layers.1.mlp.up_proj",
            "stage 1, before .* of model.layers.1.mlp.*, has no parameters; the nearest call that reads some is linear",
        ),
        ("stages=2,memory_bytes=1000", "no cut into 2 stages leaves each at most 1000; the nearest takes"),
    ],
)
def test_what_cannot_be_cut_so(options: str, message: str) -> None:
    cutter = Cutter("llama")
    context = PassContext(cutter.captured.fake_mode, {"dp": 1, "pp": 2}, _layouts(cutter.model))
    with pytest.raises(PassError, match=message):
        Pipeline.parse(f"canonicalize,cut{{{options}}},differentiate", REGISTRY).run(cutter.captured.program, context)


def _layouts(model: nn.Module) -> dict[str, ParameterLayout]:
    return {
        name: ParameterLayout.choose(name, tuple(p.shape), p.dtype, "dp", 1, True)
        for name, p in model.named_parameters()
    }
