"""A program with fused operators computes what it did before, under every plan."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Plan
from tests.support.architectures import ARCHITECTURES
from tests.support.fusable import FUSABLE
from tests.support.kernels import mode
from tests.support.split import eager_step, split_program
from tests.support.training import Trained, distance, train
from tests.support.zoo import ZOO, loss_of

_ENTRIES = ZOO | ARCHITECTURES | FUSABLE
_FAST = ("llama", "gpt2", "gemma2", "gptj")
_SLOW = tuple(name for name in _ENTRIES if name not in (*_FAST, "odd", "mixed"))


def _step(model: nn.Module, batch: dict[str, Any], plan: Plan | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and all gradients as one vector, of the model itself if there is no plan."""
    model = copy.deepcopy(model)
    if plan is not None:
        model = graphopt.compile(model, plan)
    torch.manual_seed(0)
    loss = loss_of(model(**batch))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("name", [*_FAST, *(pytest.param(each, marks=pytest.mark.long) for each in _SLOW)])
def test_loss_and_gradients_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model, batch = _ENTRIES[name].build(), _ENTRIES[name].batch()
    found, wanted = _step(model, batch, Plan(kernels="auto")), _step(model, batch, None)
    assert _apart(found[0], wanted[0]) < 1e-6
    assert _apart(found[1], wanted[1]) < 2e-6


@pytest.mark.parametrize("plan", ["remat=full", "remat=0.7", "dynamic=batch,sequence"])
def test_other_passes_take_the_operators(plan: str) -> None:
    torch.manual_seed(0)
    model, batch = ZOO["llama"].build(), ZOO["llama"].batch()
    found = _step(model, batch, Plan.parse(f"{plan},kernels=auto"))
    plain = _step(model, batch, Plan.parse(plan))
    assert all(_apart(*each) < 2e-6 for each in zip(found, plain, strict=True))
    assert not torch.equal(found[1], plain[1]), "nothing was fused"


def test_bf16_is_as_near_as_without() -> None:
    torch.manual_seed(0)
    model, batch = ZOO["llama"].build(), ZOO["llama"].batch()
    exact = _step(model, batch, None)
    fused, plain = (_step(model, batch, Plan(precision="bf16", kernels=kernels)) for kernels in ("auto", "off"))
    assert _apart(fused[0], exact[0]) < 1e-2
    assert _apart(fused[1], exact[1]) < 1.1 * _apart(plain[1], exact[1])


@pytest.mark.parametrize("where", ["before", "behind"])
def test_what_is_fused_is_split(where: str) -> None:
    torch.manual_seed(0)
    entry = ZOO["llama"]
    model, batch = entry.build(), entry.batch()
    program = split_program(model, batch, 2, fuse=where)
    assert any("graphopt.gated" in call for call in program.calls)
    assert program.run().distance(eager_step(model, batch)) < 2e-6


def test_nothing_is_fused_where_kernels_are_off() -> None:
    torch.manual_seed(0)
    model, batch = ZOO["llama"].build(), ZOO["llama"].batch()
    with mode("off"):
        found = _step(model, batch, Plan(kernels="auto"))
    assert all(torch.equal(*each) for each in zip(found, _step(model, batch, Plan()), strict=True))


def _train_sharded(rank: int, world: int) -> tuple[Trained, Trained]:
    entry = ZOO["llama"]
    found = []
    for plan in (Plan(mesh={"dp": world}, zero=3, remat="full", kernels="auto"), None):
        torch.manual_seed(0)
        model, batch = entry.build(), entry.batch()
        part = entry.part(batch, rank, world) if plan else batch
        found.append(train(graphopt.compile(model, plan) if plan else model, part))
    return found[0], found[1]


def test_sharded_and_computed_again_it_trains_as_eager_does(ranks) -> None:
    for found, wanted in ranks(2).run(_train_sharded):
        assert distance(found, wanted) < 1e-6
