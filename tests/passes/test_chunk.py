"""Layers that are computed in parts of the batch: as eager, and while what one part moves travels another computes."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Plan, Tensor
from graphopt.cost.hardware import Hardware, Link
from graphopt.cost.simulator import COMPUTE, Schedule, simulate
from graphopt.errors import PassError, PlanError
from graphopt.lowering import call
from graphopt.passes import REGISTRY
from graphopt.passes.pipeline import Pipeline
from tests.support.programs import lowered
from tests.support.split import eager_step, split_program
from tests.support.split_models import ATTENTION, MLPS, Attention, Blocks, Mlp, tokens
from tests.support.training import Trained, distance, train

BOUND = 2e-6
SLOW = Hardware("slow", {"float32": 1e8}, 1e11, 1 << 30, 0.0, Link(1e8, 1e-7))


def _blocks(layers: int = 2, **options: Any) -> Blocks:
    return Blocks(*(layer for _ in range(layers) for layer in (Attention(4, 2), Mlp(32))), **options)


MODELS: dict[str, Blocks] = {
    **{f"attention, {name}": Blocks(make()) for name, make in ATTENTION.items()},
    **{f"mlp, {name}": Blocks(make()) for name, make in MLPS.items()},
    "dropout": _blocks(1, dropout=0.25),
    "layer norms, tied": _blocks(1, norm=nn.LayerNorm, tied=True),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=() if (index + other) % 2 == 0 else pytest.mark.long)
        for index, name in enumerate(MODELS)
        for other, options in enumerate(("", ",sequence=true"))
    ],
)
def test_parts_of_the_batch_give_what_all_of_it_does(name: str, options: str) -> None:
    model, batch = MODELS[name], tokens()
    split = split_program(model, batch, 2, options, chunks=2)
    assert split.run().distance(eager_step(model, batch)) <= BOUND
    (record,) = (record for record in split.records if record.name == "chunk")
    assert record.statistics["chunked"]


def _schedule(text: str, monkeypatch: pytest.MonkeyPatch, world: int = 2) -> Schedule:
    monkeypatch.setattr(call, "hardware_of", lambda *given: SLOW)
    _, program = lowered(text, world, _blocks(logits=False), **tokens())
    return simulate(program, Plan.parse(text).resolve(world).mesh, SLOW)


@pytest.mark.parametrize("text", ["tp=2", "tp=2,tensor.sequence=true", "dp=2,tp=2,zero=3,remat=full"])
def test_what_one_part_moves_travels_while_the_other_computes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = 4 if "dp" in text else 2
    at_once = _schedule(text, monkeypatch, world)
    in_parts = _schedule(f"{text},tensor.chunks=2", monkeypatch, world)
    assert in_parts.total_seconds < at_once.total_seconds
    assert in_parts.exposed_seconds < 0.7 * at_once.exposed_seconds
    computed = [(task.start, task.end) for task in in_parts.tasks if task.stream == COMPUTE]
    moved = [(task.start, task.end) for task in in_parts.tasks if task.stream == "tp"]
    beside = [any(start < b and a < end for a, b in computed) for start, end in moved]
    assert sum(beside) > 0.7 * len(beside)


def test_a_batch_that_cannot_be_cut_is_computed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = _blocks(1), {name: value[:1] for name, value in tokens().items()}
    with caplog.at_level(logging.WARNING, "graphopt"):
        split = split_program(model, batch, 2, chunks=2)
    assert "no move of activations can be cut in 2 along the batch" in caplog.text
    assert split.run().distance(eager_step(model, batch)) <= BOUND
    assert len(split.calls) == len(split_program(model, batch, 2).calls)


def _train(rank: int, world: int, texts: list[str]) -> list[Trained]:
    runs = []
    for text in ["", *texts]:
        torch.manual_seed(0)
        model, batch = _blocks(1), tokens()
        found = graphopt.compile(model, Plan.parse(text).resolve(world)) if text else model
        runs.append(train(found, batch, lambda found=found, **given: found(**given)[0], steps=3))
    return runs


def test_ranks_train_as_eager(ranks) -> None:
    plans = ["tp=2,tensor.chunks=2", "tp=2,tensor.chunks=2,tensor.sequence=true,remat=full,offload=host"]
    for eager, *found in ranks(2).run(_train, plans):
        assert max(distance(each, eager) for each in found) <= BOUND


def test_what_is_asked_for_must_make_sense() -> None:
    with pytest.raises(PlanError, match=r"tensor\.chunks=0 is out of range"):
        Plan.parse("tp=2,tensor.chunks=0")
    for text, message in (
        ("chunk{chunks=1}", "chunks=1 is too few; the nearest valid choice is 2"),
        ("interleave{ahead=-1}", "ahead=-1 is negative; the nearest valid choice is 0"),
    ):
        with pytest.raises(PassError, match=message):
            Pipeline.parse(text, REGISTRY)
    assert Plan.parse("tp=2,tensor.chunks=4") == Plan(mesh={"tp": 2}, tensor=Tensor(chunks=4))
