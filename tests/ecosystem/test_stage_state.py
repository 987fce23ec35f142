"""A model cut into stages: distributed checkpoints of it and its optimizer, gradient norms, whole parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

import graphopt
from graphopt import GraphoptError, Plan, RankMismatchError
from tests.support.pipelined import is_here, place_of
from tests.support.training import whole
from tests.support.zoo import ZOO

SHARDED = "pp=2,dp=2,zero=3,zero.whole_below=64,pipeline.microbatches=4"
SPLIT = "pp=2,tp=2,pipeline=zbv,pipeline.microbatches=2"  # two stages on a rank
OTHERS = ["pp=4,pipeline.microbatches=4", "tp=4", "dp=4,zero=1,zero.whole_below=64", SPLIT, SHARDED]
State = dict[str, torch.Tensor]


def _compiled(name: str, text: str, rank: int, world: int, on_meta: bool = False) -> tuple[Any, dict[str, Any]]:
    entry, plan = ZOO[name], Plan.parse(text).resolve(world)
    torch.manual_seed(0)
    batch = entry.part(entry.batch(), place_of(plan, rank), plan.data_parallel_ranks)
    with torch.device("meta" if on_meta else "cpu"):
        model = entry.build().train()
    return graphopt.compile(model, plan, example_inputs=batch), batch


def _state(model: Any, optimizer: Any) -> State:
    """Parameters of this rank's stages and what the optimizer knows of them, whole, by name."""
    here = {name: p for name, p in model.named_parameters() if is_here(p)}
    known = {f"{name}.{key}": value for name, p in here.items() for key, value in optimizer.state[p].items()}
    return {name: whole(value) for name, value in (here | known).items()}


def _merged(states: list[State]) -> State:
    """What the ranks have among them; what several have is alike."""
    merged: State = {}
    for state in states:
        assert all(torch.equal(merged[name], value) for name, value in state.items() if name in merged)
        merged |= state
    return merged


def _save(rank: int, world: int, folder: str, name: str, text: str) -> State:
    model, batch = _compiled(name, text, rank, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def step() -> None:
        model.train_step(batch)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    parameters, state = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    saved = _state(model, optimizer)
    step()
    parameters, state = get_state_dict(model, optimizer)
    dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    options = StateDictOptions(strict=False)  # the optimizer knows nothing of parameters that lie elsewhere
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state, options=options)
    back = _state(model, optimizer)
    assert back.keys() == saved.keys() and all(torch.equal(back[name], value) for name, value in saved.items())
    return saved


def _load(rank: int, world: int, folder: str, name: str, texts: list[str]) -> list[State]:
    loaded = []
    for text in texts:
        model, batch = _compiled(name, text, rank, world, on_meta=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        parameters, state = get_state_dict(model, optimizer)
        dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)
        loaded.append(_state(model, optimizer))
        model.train_step(batch)
        optimizer.step()
    return loaded


def _reshard(ranks: Any, folder: Path, name: str, plan: str, others: list[str]) -> None:
    saved = _merged(ranks(4).run(_save, str(folder), name, plan))
    of_ranks = ranks(4).run(_load, str(folder), name, others)
    found = {text: _merged([of_rank[index] for of_rank in of_ranks]) for index, text in enumerate(others)}
    found["dp=1"] = _load(0, 1, str(folder), name, ["dp=1"])[0]
    for text, loaded in found.items():
        assert saved.keys() == loaded.keys(), text
        assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == [], text


def test_a_checkpoint_of_sharded_stages_loads_on_other_meshes(ranks, tmp_path: Path) -> None:
    _reshard(ranks, tmp_path, "gpt2", SHARDED, ["pp=4,pipeline.microbatches=4", "tp=4"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("plan", OTHERS)
def test_checkpoints_load_on_all_other_meshes(ranks, tmp_path: Path, name: str, plan: str) -> None:
    _reshard(ranks, tmp_path, name, plan, [text for text in OTHERS if text != plan])


def _steps(rank: int, world: int, texts: list[str], largest: float, order: float) -> list[tuple[float, State, State]]:
    """After a step under each plan: the norm, clipped gradients by name, and the parameters, gathered."""
    found = []
    for text in texts:
        model, batch = _compiled("gpt2", text, rank, world)
        model.train_step(batch)
        norm = float(graphopt.clip_grad_norm_(model, largest, order))
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        graphopt.check_replicas(model)
        with graphopt.gathered(model), torch.no_grad():
            parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
            loss = float(model(**batch).loss)
        assert not any(isinstance(p, DTensor) for p in parameters.values())
        assert loss == pytest.approx(float(model.eval_step(batch).loss), rel=1e-6)
        found.append((norm, gradients, parameters))
    return found


@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_gradients_are_clipped_by_the_norm_of_all_stages(ranks, order: float) -> None:
    torch.manual_seed(0)
    batch, model = ZOO["gpt2"].batch(), ZOO["gpt2"].build().train()
    model(**batch).loss.backward()
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    largest = 0.25 if order == 2.0 else 0.01
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), largest, order))
    assert norm > largest, "nothing would be clipped"
    plans = [SHARDED, SPLIT, "dp=2,tp=2,zero=2,zero.whole_below=64"]
    for of_rank in ranks(4).run(_steps, plans, largest, order):
        for found, gradients, parameters in of_rank:
            assert found == pytest.approx(norm, rel=1e-5)
            assert all(torch.equal(parameters[name], value) for name, value in wanted.items())
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


def _norms(rank: int, world: int) -> list[float]:
    model, batch = _compiled("gpt2", SPLIT, rank, world)
    model.train_step(batch)
    with pytest.raises(GraphoptError, match="norm_type is 0; give a number above 0"):
        graphopt.clip_grad_norm_(model, 1.0, 0)
    norms = [float(graphopt.clip_grad_norm_(model, 0.1)) for _ in range(2)]
    for parameter in model.parameters():
        if rank == 3 and parameter.grad is not None:
            parameter.grad.to_local().fill_(float("nan"))
    with pytest.raises(GraphoptError, match="gradients is nan"):
        graphopt.clip_grad_norm_(model, 0.1, error_if_nonfinite=True)
    return norms


def test_all_ranks_see_the_same_norm(ranks) -> None:
    first, *others = ranks(4).run(_norms)
    assert first[1] == pytest.approx(0.1, rel=1e-4)
    assert all(norms == first for norms in others)


def _shared(rank: int, world: int) -> str:
    model, _ = _compiled("gpt2", "pp=2,tp=2,pipeline.microbatches=2", rank, world)
    graphopt.check_replicas(model)
    embedding = model.get_parameter("transformer.wte.weight")
    assert is_here(embedding), "it is tied to the head, so that both stages have it"
    if rank == 3:
        with torch.no_grad():
            embedding.to_local()[0, 0] += 1
    with pytest.raises(RankMismatchError) as caught:
        graphopt.check_replicas(model)
    return str(caught.value)


def test_a_tied_parameter_that_differs_between_stages_is_named(ranks) -> None:
    for said in ranks(4).run(_shared):
        assert "transformer.wte.weight of rank 3 is not that of 1" in said


def _whole_states(rank: int, world: int, values: State) -> bool:
    model, batch = _compiled("llama", SHARDED, rank, world, on_meta=True)
    with pytest.raises(GraphoptError, match=r"lm_head.weight, .* have no values yet; say graphopt.load_weights"):
        model.train_step(batch)
    model.load_state_dict(values)
    model.train_step(batch)
    with graphopt.gathered(model):
        return all(torch.equal(value, values[name]) for name, value in model.named_parameters())


def test_a_whole_state_dict_loads_into_stages(ranks) -> None:
    assert all(ranks(4).run(_whole_states, ZOO["llama"].build().state_dict()))
