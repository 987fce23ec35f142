"""What people do with a model in training works on a compiled one, on one rank and on two."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import graphopt
from graphopt import Plan, Zero
from tests.support.training import mean, whole
from tests.support.zoo import ROWS, ZOO

LLAMA = ZOO["llama"]
STAGES = [Zero(stage, whole_below=64) for stage in range(4)]


def _pair(zero: Zero) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    """A compiled model, an eager one with the same weights, and the whole batch."""
    torch.manual_seed(0)
    model = LLAMA.build().train()
    eager = copy.deepcopy(model)
    return graphopt.compile(model, Plan(zero=zero)), eager, LLAMA.batch()


def _apart(model: nn.Module, eager: nn.Module, of: Callable[[torch.Tensor], torch.Tensor] = lambda p: p) -> float:
    """Relative difference of all parameters (or of what `of` takes from each) as one vector."""
    pairs = [
        (whole(of(a)).double(), of(b).detach().double())
        for a, b in zip(model.parameters(), eager.parameters(), strict=True)
    ]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt())


def _grad(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-5),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-5, fused=True),
    "adamw-loop": lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-5, foreach=False),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2, eps=1e-5),
}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    wide = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": wide, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _optimize(rank: int, world: int, name: str) -> list[float]:
    distances = []
    for zero in STAGES if name == "adamw" else STAGES[::3]:  # gradients are whole or cut
        model, eager, batch = _pair(zero)
        optimizers = [OPTIMIZERS[name](_groups(m)) for m in (model, eager)]  # made before the first call
        held = [id(p) for group in optimizers[0].param_groups for p in group["params"]]
        for _ in range(3):
            for each, optimizer, data in zip(
                (model, eager), optimizers, (LLAMA.part(batch, rank, world), batch), strict=True
            ):
                each(**data).loss.backward()
                torch.nn.utils.clip_grad_norm_(each.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        assert {id(p) for p in model.parameters()} == set(held)
        distances.append(_apart(model, eager))
    return distances


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_groups_and_clipping(ranks, name: str) -> None:
    assert max(ranks(2).run(_optimize, name)[0]) <= 1e-6


def _norms(rank: int, world: int) -> list[tuple[float, float]]:
    found = []
    for zero in STAGES:
        model, eager, batch = _pair(zero)
        model(**LLAMA.part(batch, rank, world)).loss.backward()
        eager(**batch).loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3) for m in (model, eager)]
        found.append((float(whole(norms[0])), float(norms[1])))
        assert _apart(model, eager, _grad) <= 1e-6
    return found


def test_clip_grad_norm_measures_the_norm_of_the_whole_gradient(ranks) -> None:
    for ours, theirs in ranks(2).run(_norms)[0]:
        assert ours == pytest.approx(theirs, rel=1e-6)


def _accumulate(rank: int, world: int, no_sync: bool) -> tuple[list[float], list[int]]:
    distances, tensors = [], []
    for zero in STAGES:
        model, eager, batch = _pair(zero)
        half = ROWS // 2
        for step in range(2):
            data = {k: v[step * half : (step + 1) * half] for k, v in batch.items()}
            part = {k: v[rank * half // world : (rank + 1) * half // world] for k, v in data.items()}
            eager(**data).loss.backward()
            if no_sync and step == 0:
                with graphopt.no_sync(model):
                    model(**part).loss.backward()
                tensors.append(sum(p.grad is not None for p in model.parameters()))
            else:
                model(**part).loss.backward()
        distances.append(_apart(model, eager, _grad))
    return distances, tensors


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("no_sync", [False, True])
def test_gradients_accumulate_over_backwards(ranks, no_sync: bool, world: int) -> None:
    distances, reduced_early = _accumulate(0, 1, no_sync) if world == 1 else ranks(2).run(_accumulate, no_sync)[0]
    assert max(distances) <= 1e-6
    if world == 2 and no_sync:
        assert reduced_early == [0, 0, 0, 0], "nothing is reduced inside no_sync"


def _twice(rank: int, world: int) -> list[float]:
    distances = []
    for zero in STAGES:
        model, eager, batch = _pair(zero)
        for each, data in ((model, LLAMA.part(batch, rank, world)), (eager, batch)):
            first = each(**data).loss
            second = each(**{k: v.flip(1) for k, v in data.items()}).loss
            (first + 2 * second).backward()
        distances.append(_apart(model, eager, _grad))
    return distances


@pytest.mark.parametrize("world", [1, 2])
def test_two_calls_before_one_backward(ranks, world: int) -> None:
    assert max(_twice(0, 1) if world == 1 else ranks(2).run(_twice)[0]) <= 1e-6


def _evaluate(rank: int, world: int) -> list[tuple[float, float]]:
    found = []
    for zero in STAGES:
        model, eager, batch = _pair(zero)
        part = LLAMA.part(batch, rank, world)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, eager)]
        for _ in range(2):
            for each, optimizer, data in zip((model, eager), optimizers, (part, batch), strict=True):
                each.train()(**data).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                found.append((mean(model.eval()(**part).loss), float(eager.eval()(**batch).loss)))
    return found


def test_evaluation_between_steps_sees_the_latest_parameters(ranks) -> None:
    for ours, theirs in ranks(2).run(_evaluate)[0]:
        assert ours == pytest.approx(theirs, rel=1e-6)


def _changed_by_hand(rank: int, world: int) -> list[tuple[float, float]]:
    found = []
    for zero in STAGES:
        model, eager, batch = _pair(zero)
        part = LLAMA.part(batch, rank, world)
        with torch.no_grad():
            model(**part)
            for each in (model, eager):
                for parameter in each.parameters():
                    parameter.mul_(1.5)
            found.append((mean(model(**part).loss), float(eager(**batch).loss)))
    return found


def test_a_change_by_hand_is_seen(ranks) -> None:
    for ours, theirs in ranks(2).run(_changed_by_hand)[0]:
        assert ours == pytest.approx(theirs, rel=1e-6)


class _Several(nn.Module):
    """A tuple, a dict and a plain value as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.first(x))
        logits = self.second(hidden)
        return {"loss": logits.square().mean(), "parts": (hidden, logits), "name": "several", "again": logits}


LOSSES: dict[str, Callable[[dict[str, Any]], torch.Tensor]] = {
    "loss": lambda out: out["loss"],
    "logits": lambda out: out["parts"][1].sin().mean(),
    "both": lambda out: out["loss"] + out["again"].sin().mean(),
    "hidden": lambda out: out["parts"][0].cos().mean(),
}


def _several(rank: int, world: int) -> list[float]:
    distances = []
    for zero in STAGES:
        torch.manual_seed(0)
        eager, x = _Several(), torch.randn(ROWS, 6)
        model = graphopt.compile(copy.deepcopy(eager), Plan(zero=zero))
        for name in (*LOSSES, *LOSSES):
            for each, data in ((model, x[rank * ROWS // world : (rank + 1) * ROWS // world]), (eager, x)):
                each.zero_grad()
                out = each(data)
                assert out["name"] == "several" and out["again"] is out["parts"][1]
                LOSSES[name](out).backward()
            with_gradient = [
                (a, b) for a, b in zip(model.parameters(), eager.parameters(), strict=True) if b.grad is not None
            ]
            assert all(a.grad is not None for a, _ in with_gradient)
            distances += [float((whole(_grad(a)) - _grad(b)).norm() / _grad(b).norm()) for a, b in with_gradient]
    return distances


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_to_any_of_several_outputs(ranks, world: int) -> None:
    assert max(_several(0, 1) if world == 1 else ranks(2).run(_several)[0]) <= 2e-6


def _two_models(rank: int, world: int) -> list[float]:
    pairs = [_pair(STAGES[1]), _pair(STAGES[3])]
    for model, eager, batch in pairs:
        for each, data in ((model, LLAMA.part(batch, rank, world)), (eager, batch)):
            each(**data).loss.backward()
    return [_apart(model, eager, _grad) for model, eager, _ in pairs]


def test_two_compiled_models_in_one_process(ranks) -> None:
    assert max(ranks(2).run(_two_models)[0]) <= 1e-6


def _identity(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = LLAMA.build()
    keys, kind = list(model.state_dict()), type(model)
    twin = copy.deepcopy(model)
    compiled = graphopt.compile(model, Plan(zero=3))
    assert compiled is model and isinstance(compiled, kind) and list(compiled.state_dict()) == keys
    assert all(isinstance(p, DTensor) for p in compiled.parameters())
    assert not any(isinstance(p, DTensor) for p in twin.parameters())


def test_the_model_stays_what_it_was(ranks) -> None:
    ranks(2).run(_identity)


def test_parameters_changed_between_forward_and_backward_are_refused() -> None:
    model, _, batch = _pair(STAGES[3])
    loss = model(**batch).loss
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice_needs_retain_graph() -> None:
    model, eager, batch = _pair(STAGES[0])
    for each in (model, eager):
        loss = each(**batch).loss
        loss.backward(retain_graph=True)
        loss.backward()
    assert _apart(model, eager, _grad) == 0
    with pytest.raises(RuntimeError):
        loss.backward()


def test_gradients_reach_the_inputs() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model = graphopt.compile(copy.deepcopy(eager))
    x = torch.randn(3, 4)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for each, value in zip((model, eager), inputs, strict=True):
        each(value).sum().backward()
    assert torch.equal(*(value.grad for value in inputs))
