"""A compilation beside the model: right ones agree, and a fault planted in a pass is found there, with its node."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import GraphoptError
from graphopt.inspect.differential import Verdict, check
from graphopt.inspect.simulate import Simulation
from graphopt.ir import Level, Program
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass, PassContext, Tier
from graphopt.plan import Plan
from tests.ir.built import Hand, functional
from tests.support.zoo import ZOO

aten = torch.ops.aten
PLANS = ["zero=0", "zero=1", "zero=3,zero.whole_below=0", "zero=3,precision=bf16"]
SPLIT = [
    ("llama", "dp=2,tp=2,zero=3,tensor.gather_outputs=false,tensor.patterns=[lm_head:column]"),
    ("t5", "tp=3"),
    ("odd", "tp=2,dp=2,zero=3,zero.whole_below=0"),
    ("gpt2", "dp=2,cp=2,zero=1,precision=bf16"),
    ("gpt2", "sp=2,remat=full"),
]


@pytest.mark.parametrize("text", PLANS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "deepseek", "odd"])
def test_what_the_passes_make_agrees_with_the_model(name: str, text: str) -> None:
    model = ZOO[name].build().train()
    batch, state = ZOO[name].batch(), torch.get_rng_state()
    verdict = check(model, (), batch, Plan.parse(text).resolve(2))
    assert torch.equal(torch.get_rng_state(), state), "the user's generator is left alone"
    assert verdict.guilty is None and verdict.node is None, verdict
    assert [each.name for each in verdict.comparisons][:4] == [
        "capture",
        "canonicalize",
        "state_causal",
        "differentiate",
    ]


@pytest.mark.parametrize(("name", "text"), SPLIT)
def test_what_is_split_over_other_axes_agrees_with_the_model(name: str, text: str) -> None:
    plan = Plan.parse(text)
    verdict = check(ZOO[name].build().train(), (), ZOO[name].batch(), plan.resolve(math.prod(plan.mesh.values())))
    assert verdict.guilty is None and verdict.node is None, verdict
    tiers = {each.name: each.tier for each in verdict.comparisons}
    assert tiers["split"] is tiers["differentiate"] is Tier.REASSOCIATES and tiers["checkpoint"] is Tier.BITWISE


class _Block(nn.Module):
    """Batch norm and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(self.first(x)))
        return self.second(self.norm(y) * x)


class _Blocks(nn.Module):
    """Two layers that are alike, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) / 4
        return x.square().mean()


ELSEWHERE = "offload=disk,offload.least_bytes=0,offload.state=true"
PLAN = f"zero=3,zero.whole_below=0,precision=fp32,batch_norm=global,remat=full,kernels=auto,{ELSEWHERE}"


def _planted(kind: type[Pass]) -> type[Pass]:
    """The pass, followed by a fault: a product, sum or quotient of another factor."""

    class Faulty(kind):  # type: ignore[misc, valid-type]
        def run(self, program: Program, context: PassContext) -> bool:
            changed: bool = super().run(program, context)
            targets = (aten.tanh.default,) if program.level is Level.FORWARD else (aten.tanh_backward.default,)
            node = next(n for n in program.compute_nodes() if n.target in targets)
            with program.graph.inserting_after(node):
                twice = program.graph.call_function(aten.mul.Tensor, (node, 3))
            twice.meta = dict(node.meta)
            node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
            return changed

    return Faulty


OF_SPLIT_LAYERS = {"split", "chunk", "interleave"}
OF_STAGES = {"cut"}  # of which there is a check of its own: `tests/passes/test_cut.py` runs all stages


@pytest.mark.parametrize("name", sorted(REGISTRY.keys() - OF_SPLIT_LAYERS - OF_STAGES))
def test_a_fault_is_traced_to_the_pass_that_made_it(name: str) -> None:
    verdict = _verdict_of_a_fault(_Blocks(), {"x": torch.randn(24, 8)}, PLAN, name)
    assert verdict.node is not None or name in ("canonicalize",)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("split", "tp=2"),
        ("split", "cp=2"),
        ("split", "sp=2"),
        ("chunk", "tp=2,tensor.chunks=2"),
        ("interleave", "tp=2,tensor.chunks=2"),
    ],
)
def test_a_fault_is_traced_to_the_pass_that_splits_layers(name: str, plan: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    verdict = _verdict_of_a_fault(model, {"input": torch.randn(4, 4, 8)}, f"dp=2,zero=3,{plan}", name)
    assert verdict.node is not None


def test_a_pipeline_is_checked_without_its_cut() -> None:
    with pytest.raises(GraphoptError, match="leave pp out of the plan"):
        check(_Blocks(), (), {"x": torch.randn(24, 8)}, Plan.parse("pp=2").resolve(2))


def _verdict_of_a_fault(model: nn.Module, call: dict[str, torch.Tensor], text: str, name: str) -> Verdict:
    registry: dict[str, Any] = {**REGISTRY, name: _planted(REGISTRY[name])}
    parsed = Plan.parse(text)
    plan = parsed.resolve(math.prod(parsed.mesh.values()) if parsed.mesh else 2)
    assert check(model, (), call, plan).guilty is None
    verdict = check(model, (), call, plan, registry)
    assert verdict.guilty is not None and verdict.guilty.name == name
    return verdict


@pytest.mark.parametrize("statistics", ["local", "global"])
def test_batch_norms_compute_in_the_dtype_they_are_stored_in(statistics: str) -> None:
    plan = Plan.parse(f"zero=3,zero.whole_below=0,precision=bf16,batch_norm={statistics}").resolve(2)
    assert check(_Blocks(), (), {"x": torch.randn(6, 8)}, plan).guilty is None


def test_a_model_without_values_cannot_be_compared() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(GraphoptError, match="meta device"):
        check(model, (torch.randn(1, 2),), {}, Plan().resolve(1))


def test_ranks_of_two_axes_exchange_within_theirs() -> None:
    """On a 2 x 3 mesh the groups of an axis are those that differ on it alone."""
    hand = Hand()
    value = hand.input(1)
    gathered = hand.waited(hand.call(functional.all_gather_into_tensor_coalesced.default, [value], 3, "tp"), 0)
    launched = hand.call(functional.all_reduce.default, value, "sum", "dp")
    total = hand.call(functional.wait_tensor.default, launched)
    program = hand.program(gathered, total)
    simulation = Simulation(program, {"dp": 2, "tp": 3})
    values = dict(simulation.run([[torch.tensor([float(10**rank)]) for rank in range(6)]]))
    assert [each.tolist() for each in values[gathered]] == [[1, 10, 100]] * 3 + [[1e3, 1e4, 1e5]] * 3
    assert [each.item() for each in values[total]] == [1001, 10010, 100100] * 2


def test_a_pass_that_finds_nothing_is_compared_bit_for_bit() -> None:
    """Without a batch norm nothing is computed over the whole batch, so it is no measure."""
    plan = Plan.parse("zero=0,batch_norm=global").resolve(2)
    verdict = check(nn.Linear(3, 2), (torch.randn(4, 3),), {}, plan)
    (found,) = (each for each in verdict.comparisons if each.name == "synchronize_batch_norm")
    assert verdict.guilty is None and found.tier is Tier.BITWISE


class _Unmoved(nn.Module):
    """Writes a buffer what it holds already."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.mul_(0.9)
        return (x * self.weight + self.seen).sum()


def test_a_buffer_that_is_written_its_own_value_is_no_difference() -> None:
    verdict = check(_Unmoved(), (torch.ones(2, 3),), {}, Plan.parse("zero=0").resolve(2))
    assert verdict.guilty is None, verdict
