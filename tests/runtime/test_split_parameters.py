"""Parameters split over a model axis: they lie as the first compiled call decides, and the ordinary tools go on."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard

import graphopt
from graphopt import Plan, Zero
from graphopt._torch import local_tensor
from graphopt.errors import PassError
from graphopt.ir import ParameterLayout
from graphopt.lowering import lower
from graphopt.lowering.passes import pipeline_text, planned_pipeline
from graphopt.optim import AdamW
from tests.support.columns import BY_HAND, Columns
from tests.support.training import whole

BATCH = 8


def _compiled(mesh: dict[str, int], stage: int, seed: int = 0, **more: Any) -> tuple[Columns, Columns, torch.Tensor]:
    """A compiled model, its eager twin, and the whole batch."""
    torch.manual_seed(seed)
    eager, x = Columns().train(), torch.randn(BATCH, 6)
    plan = Plan(mesh=mesh, zero=Zero(stage, whole_below=24), **more)
    model = graphopt.compile(copy.deepcopy(eager), plan, registry=BY_HAND)
    assert isinstance(model, Columns)
    return model, eager, x


def _part(x: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """The rows of this rank."""
    assert isinstance(model, Columns) and isinstance(model.scale, DTensor)
    mesh = model.scale.device_mesh
    return x.chunk(mesh["dp"].size())[mesh.get_local_rank("dp")]


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    model(x).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def _apart(model: torch.nn.Module, eager: torch.nn.Module) -> float:
    """The largest relative difference of a parameter."""
    pairs = zip(model.parameters(), eager.parameters(), strict=True)
    return max(float((whole(a) - b.detach()).norm() / b.detach().norm()) for a, b in pairs)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "loop": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=False),
    "ours": lambda parameters: AdamW(parameters, lr=1e-2),
}


def _train(rank: int, world: int, mesh: dict[str, int], stage: int, name: str) -> float:
    model, eager, x = _compiled(mesh, stage)
    optimizers = [OPTIMIZERS[name](each.parameters()) for each in (model, eager)]  # made before the first call
    held = {id(parameter) for parameter in model.parameters()}
    for step in range(3):
        data = x[: BATCH // 2] if step == 1 else x  # another size wants another program
        for each, optimizer, part in zip((model, eager), optimizers, (_part(data, model), data), strict=True):
            _step(each, optimizer, part)
    assert {id(parameter) for parameter in model.parameters()} == held
    assert model.tied is model.first.weight
    return _apart(model, eager)


@pytest.mark.parametrize(
    ("mesh", "stage", "optimizer"),
    [
        ({"dp": 2, "tp": 2}, 0, "foreach"),
        ({"dp": 2, "tp": 2}, 2, "ours"),
        ({"tp": 2, "dp": 2}, 1, "loop"),
        ({"tp": 2, "dp": 2}, 3, "foreach"),
        ({"tp": 4}, 3, "foreach"),
    ],
    ids=str,
)
def test_training_equals_eager(ranks, mesh: dict[str, int], stage: int, optimizer: str) -> None:
    assert max(ranks(4).run(_train, mesh, stage, optimizer)) <= 1e-6


def _placed(rank: int, world: int, stage: int) -> None:
    model, _, x = _compiled({"dp": 2, "tp": 2}, stage)
    assert all(p.placements == (Replicate(), Replicate()) for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model(_part(x, model)).backward()
    optimizer.step()
    cut = Replicate() if stage == 0 else Shard(0)
    assert model.first.weight.placements == (Shard(0), cut)
    assert model.grid.placements == (Shard(1), cut)
    assert model.other.weight.placements == (Replicate(), cut)
    assert model.other.bias.placements == (Replicate(), Replicate())  # small
    mesh = model.grid.device_mesh
    assert mesh.mesh_dim_names == ("tp", "dp") and mesh.mesh.tolist() == [[0, 2], [1, 3]]
    assert dist.get_process_group_ranks(mesh.get_group("dp")) == [rank % 2, rank % 2 + 2]
    rows = 3 if stage == 0 else 2 - rank // 2
    for tensor in (model.grid, model.grid.grad, optimizer.state[model.grid]["exp_avg"]):
        assert local_tensor(tensor).shape == (rows, 4)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_axes_that_split_the_model_cut_first(ranks, stage: int) -> None:
    ranks(4).run(_placed, stage)


def _values(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    moments = {f"{n}.m": whole(optimizer.state[p]["exp_avg"]) for n, p in model.named_parameters()}
    return {**{n: whole(p) for n, p in model.named_parameters()}, **moments}


def _save(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    model, _, x = _compiled({"dp": 2, "tp": 2}, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        _step(model, optimizer, _part(x, model))
    parameters, state = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    return _values(model, optimizer)


def _load(rank: int, world: int, folder: str, mesh: dict[str, int], stage: int, early: bool) -> dict[str, torch.Tensor]:
    """early: before the first call, when parameters are still whole."""
    model, _, x = _compiled(mesh, stage, seed=1)
    x = _part(x, model) if world > 1 else x
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if not early:
        _step(model, optimizer, x)
    parameters, state = get_state_dict(model, optimizer)
    dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)
    if early:
        with torch.no_grad():
            model(x)
    return _values(model, optimizer)


def test_a_checkpoint_loads_on_other_meshes_bit_for_bit(ranks, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    saved = ranks(4).run(_save, folder)[0]
    for mesh, stage, early in (({"dp": 4}, 3, False), ({"tp": 4}, 1, True), ({"dp": 2, "tp": 2}, 1, False)):
        for loaded in ranks(4).run(_load, folder, mesh, stage, early):
            assert [name for name, value in saved.items() if not torch.equal(value, loaded[name])] == [], mesh
    loaded = _load(0, 1, folder, {}, 0, False)
    assert [name for name, value in saved.items() if not torch.equal(value, loaded[name])] == []


def _state_dicts(rank: int, world: int) -> None:
    for stage in (2, 3):
        model, _, x = _compiled({"dp": 2, "tp": 2}, stage)
        x = _part(x, model)
        _step(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
        wanted = model(x).detach()
        own = {name: value.clone() for name, value in model.state_dict().items()}
        full = {name: whole(value) for name, value in own.items()}
        for state in (own, full):
            for called in (True, False):
                other, _, _ = _compiled({"dp": 2, "tp": 2}, stage, seed=1)
                if called:
                    other(x)
                elif state is own:
                    continue
                assert other.load_state_dict(state).missing_keys == []
                assert torch.equal(other(x), wanted), (stage, called)
        with graphopt.gathered(model):
            assert all(torch.equal(p, full[name]) for name, p in model.named_parameters())
        plain = Columns()
        plain.load_state_dict(full)
        assert torch.equal(model.generate(x), plain.generate(x))
        assert all(isinstance(p, DTensor) for p in model.parameters())


def test_state_dicts_load_as_they_are_and_whole(ranks) -> None:
    ranks(4).run(_state_dicts)


def _accumulate(rank: int, world: int, mesh: dict[str, int]) -> float:
    worst = 0.0
    for stage in (0, 3):
        model, eager, x = _compiled(mesh, stage)
        for half, keep in ((x[: BATCH // 2], True), (x[BATCH // 2 :], False)):
            with graphopt.no_sync(model) if keep else contextlib.nullcontext():
                model(_part(half, model)).backward()
            eager(half).backward()
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            worst = max(worst, float((whole(a.grad) - b.grad).norm() / b.grad.norm()))
    return worst


@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 2}, {"tp": 4}], ids=str)
def test_gradients_accumulate(ranks, mesh: dict[str, int]) -> None:
    assert max(ranks(4).run(_accumulate, mesh)) <= 1e-6


def _draws(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = graphopt.compile(Columns(dropout=0.5), Plan(mesh={"dp": 2, "tp": 2}, zero=3), registry=BY_HAND)
    model(torch.ones(64, 6)).backward()
    assert isinstance(model, Columns) and isinstance(model.other.bias.grad, DTensor)
    return model.other.bias.grad.to_local(), torch.rand(1)


def test_ranks_that_share_a_replica_draw_alike(ranks) -> None:
    gradients, draws = zip(*ranks(4).run(_draws), strict=True)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[2], gradients[3])
    assert all(torch.equal(draw, draws[0]) for draw in draws)


def test_layers_are_split_before_gradients_are_made() -> None:
    plan = Plan(mesh={"dp": 2, "tp": 2}, batch_norm="global").resolve(4)
    steps = "canonicalize,state_causal,synchronize_batch_norm,split{axis=tp},differentiate"
    assert pipeline_text(plan).startswith(steps)
    with pytest.raises(PassError, match="splits nothing over tp"):
        planned_pipeline(Plan(mesh={"tp": 2}, passes="canonicalize,differentiate,checkpoint").resolve(2), BY_HAND)


def test_a_program_takes_parameters_to_lie_as_they_do() -> None:
    call: tuple[Any, ...] = (Columns(), (torch.randn(4, 6),), {}, Plan(mesh={"dp": 2, "tp": 2}, zero=3).resolve(4))
    seen: dict[str, ParameterLayout] = {}
    made = lower(*call, layouts=seen, registry=BY_HAND)
    assert made.layouts is seen and seen["grid"].shape == (3, 4) and seen["grid"].whole_shape == (3, 8)
    again = lower(*call, decided=made.layouts, registry=BY_HAND)
    assert again.layouts == made.layouts
    moved = {**made.layouts, "grid": made.layouts["grid"].split_over()}
    with pytest.raises(PassError, match="lays parameters out otherwise"):
        lower(*call, decided=moved, registry=BY_HAND)
