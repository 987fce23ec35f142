"""The block in models that are compiled for one rank."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.capture.arguments import flatten_call
from graphopt.capture.export import capture
from graphopt.cost.operations import contraction_flops
from graphopt.passes.base import PassContext
from graphopt.passes.canonicalize import Canonicalize
from graphopt.triton_kernels.experts.products.op import GROUPED_MM, GROUPED_OUTER
from tests.support.experts import OPTIONS, WIDTH, vectors, with_experts
from tests.support.parts import check_program
from tests.support.split import split_program
from tests.support.training import same_bits, train, whole

options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@options
@pytest.mark.parametrize("plan", ["", "remat=0.9,verify=true"])
def test_a_world_of_one_is_eager_bit_for_bit(options: dict[str, Any], plan: str) -> None:
    batch = vectors()
    eager, model = with_experts(**options), graphopt.compile(with_experts(**options), plan)
    assert same_bits(train(model, batch), train(eager, batch)) == []
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in eager.named_buffers())
    assert all(bool(buffer.any()) for buffer in buffers.values()), "biases move"
    for other in (eager, model):
        other.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch), eager(**batch))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in eager.named_buffers()), "but not in evaluation"


@options
def test_one_program_is_for_batches_of_every_size(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    plan = "dynamic=batch,sequence,verify=true"
    eager, model = with_experts(**options), graphopt.compile(with_experts(**options), plan)
    for shape in ((4, 9), (2, 7), (5, 3)):
        batch = vectors(*shape)
        for each in (eager, model):
            each.zero_grad()
            each(**batch).backward()
        for found, wanted in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.equal(whole(found.grad), wanted.grad)
    assert "recompiling" not in caplog.text


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


def test_what_a_checkpoint_computes_again_is_routed_as_before() -> None:
    """In eager the second run would choose with biases that the first has moved, and move them once more."""
    options, batch = {**OPTIONS["by weight, with biases"], "bias_speed": 0.2}, vectors()
    eager, model = with_experts(**options), with_experts(**options)
    found = train(graphopt.compile(_Checkpointed(model)), batch)
    wanted = train(eager, batch)
    assert found.losses == wanted.losses
    assert all(torch.equal(found.parameters[f"model.{name}"], value) for name, value in wanted.parameters.items())
    assert torch.equal(model.block.router.bias, eager.block.router.bias)


def test_a_step_multiplies_each_token_with_its_experts_alone() -> None:
    """Two products for two experts a token, and as many again for either gradient."""
    batch = vectors()
    split = split_program(with_experts(), batch, 1)
    grouped = [node for node in split.program.compute_nodes() if node.target in (GROUPED_MM, GROUPED_OUTER)]
    assert [node.target for node in grouped].count(GROUPED_OUTER) == 2
    assignments = batch["x"].shape[0] * batch["x"].shape[1] * 2
    assert sum(contraction_flops(node) or 0 for node in grouped) == 3 * 2 * assignments * WIDTH * (2 * 24 + 24)


@options
def test_every_call_has_a_signature(options: dict[str, Any]) -> None:
    tensors, spec = flatten_call((), vectors())
    captured = capture(with_experts(**options), tensors, spec, ["x"])
    Canonicalize().run(captured.program, PassContext(captured.fake_mode, {"dp": 1}, {}))
    check_program(captured.program, set())
