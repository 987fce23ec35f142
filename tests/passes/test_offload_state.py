"""offload_state: parameters and gradients are elsewhere while nothing computes with them, and no bit changes."""

import gc
from pathlib import Path

import pytest
import torch

import graphopt
from bench.live import most_alive
from bench.segments import is_in_file
from graphopt import Offload, Plan, PlanError
from graphopt.cost.memory import Memory
from graphopt.errors import PassError
from graphopt.inspect.differential import check
from graphopt.offload import DiskAdamW
from graphopt.passes.offload_state import OffloadStateOptions
from tests.support.training import differences
from tests.support.zoo import WITH_DROPOUT, ZOO, Entry

MODELS: dict[str, Entry] = {**{name: ZOO[name] for name in ("llama", "t5", "odd")}, "gpt2": WITH_DROPOUT["gpt2"]}
STATE = "offload=disk,offload.least_bytes=0,offload.state=true"


@pytest.mark.parametrize("plan", ["zero=3", "zero=1,precision=bf16", "zero=0,remat=full"])
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_changes(name: str, plan: str) -> None:
    if name == "odd":
        plan = plan.replace(",remat=full", "")
    entry = MODELS[name]
    verdict = check(entry.build(), (), entry.batch(), Plan.parse(f"dp=2,zero.whole_below=0,{plan},{STATE}").resolve(2))
    assert verdict.guilty is None
    assert {each.name: each.worst for each in verdict.comparisons}["offload_state"] == 0.0


def _trained(rank: int, world: int, name: str, plans: list[str]) -> list[list[str]]:
    return differences(MODELS[name], plans, rank, world)


@pytest.mark.parametrize("name", MODELS)
def test_training_on_one_rank_is_bitwise_that_in_memory(name: str) -> None:
    others = [STATE, f"{STATE},offload.activations=false", STATE.replace("disk", "host")]
    assert _trained(0, 1, name, ["zero=0", *others]) == [[], [], []]


def test_training_on_two_ranks_is_bitwise_that_in_memory(ranks) -> None:
    plans = ["zero=0", *(f"zero={stage},{STATE}" for stage in range(4))]
    for found in ranks(2).run(_trained, "gpt2", plans):
        assert found == [[]] * 4


def _peak(rank: int, world: int, name: str, plan: str) -> tuple[int, Memory]:
    torch.manual_seed(0)
    entry = MODELS[name]
    model = graphopt.compile(entry.build(), plan)
    batch = {key: value.clone() for key, value in entry.part(entry.batch(), rank, world).items()}
    return most_alive(model, batch, is_elsewhere=is_in_file, waits=True), graphopt.report(model).memory


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_peak_is_what_a_run_reaches(name: str) -> None:
    measured, predicted = _peak(0, 1, name, STATE)
    assert predicted.peak_bytes == measured
    assert "parameters" not in predicted.by_category and "gradients" not in predicted.by_category


@pytest.mark.parametrize("stage", [1, 3])
def test_the_peak_is_what_a_run_on_two_ranks_reaches(ranks, stage: int) -> None:
    plan = f"zero={stage},zero.whole_below=0,transport=group,{STATE}"
    for measured, predicted in ranks(2).run(_peak, "llama", plan):
        assert predicted.peak_bytes == measured


def test_parameters_keep_their_identity_and_gradients_lie_in_files(tmp_path: Path) -> None:
    model = ZOO["llama"].build()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    graphopt.compile(model, Plan(offload=Offload("disk", 0, tmp_path, state=True)))
    model(**ZOO["llama"].batch()).loss.backward()
    for name, parameter in model.named_parameters():
        was, value = before[name]
        assert parameter is was and torch.equal(parameter, value)
        assert is_in_file(parameter) and parameter.grad is not None and is_in_file(parameter.grad)


def test_a_state_dict_is_loaded_into_the_files() -> None:
    entry = MODELS["llama"]
    model, other = graphopt.compile(entry.build(), STATE), entry.build()
    model.load_state_dict(other.state_dict())
    batch = entry.batch()
    assert torch.equal(model(**batch).loss, other(**batch).loss)
    assert all(is_in_file(parameter) for parameter in model.parameters())


def test_small_parameters_stay_with_their_gradients() -> None:
    model = graphopt.compile(MODELS["llama"].build(), STATE.replace("least_bytes=0", "least_bytes=1KiB"))
    model(**MODELS["llama"].batch()).loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert is_in_file(parameter) == is_in_file(parameter.grad) == (parameter.nbytes >= 1024)


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    model = graphopt.compile(MODELS["llama"].build(), Plan(offload=Offload("disk", 0, tmp_path, state=True)))
    with DiskAdamW(model.parameters(), tmp_path) as optimizer:
        model(**MODELS["llama"].batch()).loss.backward()
        optimizer.step()
    del model, optimizer
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_asked() -> None:
    with pytest.raises(PlanError, match=r"offload.state=1 is not a truth value"):
        Offload(state=1)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="no place 'dsk'"):
        OffloadStateOptions("dsk")
