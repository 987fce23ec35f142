"""The block in compiled models: on one rank, on several, and split inside."""

from typing import Any

import pytest
import torch

import graphopt
from graphopt import Plan, Zero
from graphopt.capture.arguments import flatten_call
from graphopt.capture.export import capture
from graphopt.cost.operations import contraction_flops
from graphopt.ir.grouped import GROUPED_MM, GROUPED_OUTER
from graphopt.passes.base import PassContext
from graphopt.passes.canonicalize import Canonicalize
from tests.support.experts import WIDTH, WithExperts, vectors
from tests.support.parts import check_program
from tests.support.split import eager_step, split_program
from tests.support.training import Trained, distance, same_bits, train

BOUND = 2e-6
OPTIONS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"capacity": 0.7},
    "by weight, with biases": {"capacity": 0.7, "priority": "weight", "scores": "sigmoid", "bias_speed": 0.01},
    "plain, shared": {"gated": False, "activation": "gelu", "shared": 1, "normalized": False, "bias_speed": 0.01},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def _model(factor: float = 0.01, **options: Any) -> WithExperts:
    torch.manual_seed(0)
    return WithExperts(factor, **options).train()


@options
@pytest.mark.parametrize("plan", ["", "dynamic=true", "remat=0.5"])
def test_a_world_of_one_is_eager_bit_for_bit(options: dict[str, Any], plan: str) -> None:
    batch = vectors()
    eager, model = _model(**options), graphopt.compile(_model(**options), plan)
    assert same_bits(train(model, batch), train(eager, batch)) == []
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in eager.named_buffers())
    assert all(bool(buffer.any()) for buffer in buffers.values()), "biases move"
    for other in (eager, model):
        other.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch), eager(**batch))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in eager.named_buffers()), "but not in evaluation"


def test_a_step_multiplies_each_token_with_its_experts_alone() -> None:
    """Two products for two experts a token, and as many again for either gradient."""
    batch = vectors()
    split = split_program(_model(), batch, 1)
    grouped = [node for node in split.program.compute_nodes() if node.target in (GROUPED_MM, GROUPED_OUTER)]
    assert [node.target for node in grouped].count(GROUPED_OUTER) == 2
    assignments = batch["x"].shape[0] * batch["x"].shape[1] * 2
    assert sum(contraction_flops(node) or 0 for node in grouped) == 3 * 2 * assignments * WIDTH * (2 * 24 + 24)


@options
def test_every_call_has_a_signature(options: dict[str, Any]) -> None:
    tensors, spec = flatten_call((), vectors())
    captured = capture(_model(**options), tensors, spec, ["x"])
    Canonicalize().run(captured.program, PassContext(captured.fake_mode, {"dp": 1}, {}))
    check_program(captured.program, set())


@options
@pytest.mark.parametrize(("ranks", "split"), [(2, ""), (3, ",sequence=true"), (2, ",along=sequence")])
def test_a_split_step_gives_the_loss_the_gradients_and_the_biases_of_eager(
    options: dict[str, Any], ranks: int, split: str
) -> None:
    batch = vectors()
    found = split_program(_model(**options), batch, ranks, split)
    assert "replicated" not in found.statistics
    assert found.run().distance(eager_step(_model(**options), batch)) <= BOUND


def _train_sharded(rank: int, world: int) -> tuple[Trained, Trained]:
    """Without the router's losses, which each rank takes over its own tokens."""
    torch.manual_seed(1)
    batch = vectors(8)
    plan = Plan(mesh={"dp": world}, zero=Zero(3, whole_below=64))
    part = {"x": batch["x"].chunk(world)[rank]}
    return train(graphopt.compile(_model(0.0, shared=1), plan), part), train(_model(0.0, shared=1), batch)


def test_sharded_experts_train_as_eager_does_on_the_whole_batch(ranks) -> None:
    for found, wanted in ranks(2).run(_train_sharded):
        assert distance(found, wanted) <= BOUND
