"""State dicts, distributed checkpoints with other numbers of ranks, and generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

import graphopt
from graphopt import Plan, Zero
from tests.support.training import mean, whole
from tests.support.zoo import ZOO

LLAMA = ZOO["llama"]
SHARDED = Zero(3, whole_below=64)


def _trained(plan: Plan, rank: int, world: int, seed: int = 0, steps: int = 2) -> tuple[Any, Any, dict[str, Any]]:
    torch.manual_seed(seed)
    plan = plan.resolve(world)
    model = graphopt.compile(LLAMA.build().train(), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    replicas = plan.data_parallel_ranks
    part = LLAMA.part(LLAMA.batch(), rank * replicas // world, replicas)
    for _ in range(steps):
        model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, part


def _save(rank: int, world: int, folder: str, plan: Plan) -> dict[str, torch.Tensor]:
    model, optimizer, _ = _trained(plan, rank, world)
    parameters, state = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    moments = {f"{n}.m": whole(optimizer.state[p]["exp_avg"]) for n, p in model.named_parameters()}
    return {**{n: whole(p) for n, p in model.named_parameters()}, **moments}


def _load(rank: int, world: int, folder: str, plan: Plan) -> dict[str, torch.Tensor]:
    model, optimizer, _ = _trained(plan, rank, world, seed=1, steps=1)
    parameters, state = get_state_dict(model, optimizer)
    dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)
    moments = {f"{n}.m": whole(optimizer.state[p]["exp_avg"]) for n, p in model.named_parameters()}
    return {**{n: whole(p) for n, p in model.named_parameters()}, **moments}


def test_a_checkpoint_of_two_ranks_loads_on_other_numbers(ranks, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    saved = ranks(2).run(_save, folder, Plan(zero=SHARDED))[0]
    for stage in (1, 3):
        plan = Plan(zero=Zero(stage, whole_below=64))
        for loaded in (_load(0, 1, folder, plan), ranks(4).run(_load, folder, plan)[0]):
            assert _different(saved, loaded) == [], stage


def test_a_checkpoint_of_split_layers_loads_on_other_meshes(ranks, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    saved = ranks(4).run(_save, folder, Plan(mesh={"dp": 2, "tp": 2}, zero=SHARDED))[0]
    for mesh, stage in (({"dp": 4}, 3), ({"tp": 4}, 0), ({"dp": 1, "tp": 4}, 1)):
        for loaded in ranks(4).run(_load, folder, Plan(mesh=mesh, zero=Zero(stage, whole_below=64))):
            assert _different(saved, loaded) == [], mesh
    assert _different(saved, _load(0, 1, folder, Plan())) == []


def _different(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs in any bit, or is on one side only."""
    both = saved.keys() & loaded.keys()
    return [*(saved.keys() ^ loaded.keys()), *(name for name in both if not torch.equal(saved[name], loaded[name]))]


def _state_dicts(rank: int, world: int) -> list[float]:
    losses = []
    for stage in range(4):
        plan = Plan(zero=Zero(stage, whole_below=64))
        model, _, part = _trained(plan, rank, world)
        wanted = mean(model(**part).loss)
        own = {name: value.clone() for name, value in model.state_dict().items()}
        full = {name: whole(value) for name, value in own.items()}
        for state in (own, full):
            other, _, _ = _trained(plan, rank, world, seed=1)
            assert other.load_state_dict(state).missing_keys == []
            losses.append(abs(mean(other(**part).loss) - wanted))
    return losses


def test_state_dicts_load_sharded_or_whole(ranks) -> None:
    assert ranks(2).run(_state_dicts)[0] == [0.0] * 8


def _generate(rank: int, world: int, name: str) -> tuple[list[int], list[int]]:
    torch.manual_seed(0)
    model = ZOO[name].build().eval()
    prompt = torch.randint(1, 100, (1, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    wanted = model.generate(prompt, **options)
    graphopt.compile(model, Plan(zero=SHARDED))
    found = model.generate(prompt, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return found[0].tolist(), wanted[0].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_gathers_for_its_duration(ranks, name: str) -> None:
    for found, wanted in ranks(2).run(_generate, name):
        assert found == wanted


def _gathered(rank: int, world: int) -> bool:
    model, _, _ = _trained(Plan(zero=SHARDED), rank, world)
    wanted = {name: whole(p) for name, p in model.named_parameters()}
    with graphopt.gathered(model):
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
    return all(torch.equal(inside[name], value) for name, value in wanted.items())


def test_gathered_gives_whole_parameters(ranks) -> None:
    assert all(ranks(2).run(_gathered))
