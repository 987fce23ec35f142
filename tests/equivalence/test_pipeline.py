"""Training in stages equals eager training: bit for bit where each gradient is one sum over microbatches."""

import pytest

from graphopt import Plan
from graphopt.schedules import NAMES
from tests.support.pipelined import by_steps, eagerly, only_here
from tests.support.training import Trained, distance, same_bits

BOUND = 2e-6
# Their gradients are sums within a microbatch as well: a parameter or a value that several stages read.
OF_SEVERAL_SUMS = {"gpt2", "t5", "bert", "whisper", "mamba"}
FOURS = ["pp=4", "dp=2,pp=2,zero=3,zero.whole_below=64,pipeline=zbv", "pp=2,tp=2"]
STAGES = [f"pp=2,dp=2,zero={stage},zero.whole_below=64" for stage in range(4)]
PRODUCTS = [
    "pp=2,dp=2,zero=3,zero.whole_below=64,pipeline.gather=step",
    "pp=2,cp=2",
    "pp=2,sp=2",
    "pp=2,tp=2,tensor.sequence=true",
    "pp=4,pipeline=zbv",
]
MICROBATCHES = ",pipeline.microbatches=4"
EIGHTS = ["dp=2,pp=2,tp=2,zero=3,zero.whole_below=64", "pp=4,dp=2,zero=2,zero.whole_below=64,pipeline=zero-bubble"]


def _train(rank: int, world: int, name: str, plans: list[str]) -> list[tuple[Trained, Trained]]:
    found = [(by_steps(name, plan, rank, world), Plan.parse(plan).resolve(world)) for plan in plans]
    eager: dict[tuple[int, int], Trained] = {}
    for _, plan in found:
        key = (plan.data_parallel_ranks, plan.microbatches)
        if key not in eager:
            eager[key] = eagerly(name, *key)
    return [(each, eager[plan.data_parallel_ranks, plan.microbatches]) for each, plan in found]


def _check(answers: list[list[tuple[Trained, Trained]]], plans: list[str], *, bitwise: bool) -> None:
    """Every rank is right about its parameters, and each parameter is on some rank."""
    for index, plan in enumerate(plans):
        known: set[str] = set()
        for answer in answers:
            found, eager = answer[index]
            wanted = only_here(found, eager)
            if bitwise:
                assert same_bits(found, wanted) == [], plan
            assert distance(found, wanted) <= BOUND, plan
            known |= found.parameters.keys()
        assert known == answers[0][index][1].parameters.keys(), plan


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral", "unet"])
def test_two_stages(ranks, name: str) -> None:
    """Also in microbatches of other sizes, of which eight rows make three, and where attention's result crosses."""
    plans = ["pp=2,pipeline.microbatches=4", "pp=2,pipeline=zbv,pipeline.microbatches=3"]
    if name == "t5":
        plans.append("pp=2,pipeline=interleaved,pipeline.stages_per_rank=4,pipeline.microbatches=4")
    _check(ranks(2).run(_train, name, plans), plans, bitwise=name not in OF_SEVERAL_SUMS)


def test_every_schedule(ranks) -> None:
    plans = [f"pp=2,pipeline={schedule},pipeline.microbatches=4" for schedule in NAMES]
    plans.append("pp=2,pipeline=search,pipeline.live=3,pipeline.microbatches=4")
    _check(ranks(2).run(_train, "llama", plans), plans, bitwise=True)


def test_four_ranks(ranks) -> None:
    plans = [plan + MICROBATCHES for plan in FOURS]
    answers = ranks(4).run(_train, "llama", plans)
    _check(answers, plans, bitwise=False)
    _check([answer[:1] for answer in answers], plans[:1], bitwise=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral", "unet", "whisper", "mamba", "bert"])
def test_every_schedule_of_every_model(ranks, name: str) -> None:
    plans = [f"pp=2,pipeline={schedule},pipeline.microbatches=4" for schedule in NAMES]
    plans += ["pp=2,pipeline.microbatches=4,remat=full", "pp=2,pipeline.microbatches=4,offload=disk"]
    plans = [plan for plan in plans if name != "unet" or "remat" not in plan]
    _check(ranks(2).run(_train, name, plans, timeout=900), plans, bitwise=name not in OF_SEVERAL_SUMS)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral"])
def test_four_ranks_in_every_way(ranks, name: str) -> None:
    plans = [*FOURS, *STAGES, *PRODUCTS, *(["pp=2,ep=2"] if name == "mixtral" else [])]
    plans = [plan + MICROBATCHES for plan in plans if "pp=4" not in plan or name != "vit"]
    _check(ranks(4).run(_train, name, plans, timeout=900), plans, bitwise=False)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_eight_ranks(ranks, name: str) -> None:
    plans = [plan + MICROBATCHES for plan in EIGHTS]
    plans += ["dp=2,pp=2,ep=2,zero=1,zero.whole_below=64,pipeline.microbatches=2"] if name == "mixtral" else []
    _check(ranks(8).run(_train, name, plans, timeout=900), plans, bitwise=False)
