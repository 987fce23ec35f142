"""Fused operators beside all that changes where and when a step is computed; and which variant computes them."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import Plan
from graphopt.ir import Effect, effect_of, facts_of
from graphopt.lowering import Compilation, lower
from graphopt.triton_kernels.choice import KernelError
from tests.equivalence.test_pipeline import BOUND, MICROBATCHES
from tests.support.kernels import mode
from tests.support.pipelined import by_steps, eagerly, only_here
from tests.support.split import eager_step, split_program
from tests.support.split_models import Blocks, tokens
from tests.support.training import Trained, distance, train
from tests.support.zoo import ZOO

STEPS = 2
PAIRS = ["pp=2,pipeline.microbatches=4", "tp=2,tensor.sequence=true,tensor.chunks=2"]
OTHER_PAIRS = ["pp=2,pipeline=zbv,pipeline.microbatches=4", "tp=2", "dp=2,zero=1", "dp=2,zero=2,zero.whole_below=64"]
FOURS = ["dp=2,tp=2,zero=3,zero.whole_below=64,remat=full", "dp=2,pp=2,zero=3,zero.whole_below=64" + MICROBATCHES]


class Dropping(nn.Module):
    """Layers that normalize what they read and what dropout leaves of a product."""

    def __init__(self, layers: int = 2, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.pow(3).mean()


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x + F.dropout(self.first(x), 0.3, self.training))
        z = F.dropout(self.second(y.relu()), 0.5, self.training) + y
        return self.scale * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6))


def _step(model: nn.Module, x: torch.Tensor, plan: Plan | None) -> tuple[torch.Tensor, float]:
    """The loss and all gradients as one vector; and the number that is drawn next."""
    model = copy.deepcopy(model)
    model = graphopt.compile(model, plan) if plan is not None else model
    torch.manual_seed(5)
    loss = model(x)
    loss.backward()
    return torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for p in model.parameters())]), float(torch.rand(()))


def _compiled(text: str, model: nn.Module, **batch: Any) -> Compilation:
    return lower(model, (), batch, Plan.parse(text).resolve(1))


@pytest.mark.parametrize("text", ["kernels=auto", "kernels=reference", "kernels=auto,remat=full"])
def test_dropout_beside_a_norm_draws_what_eager_draws(text: str) -> None:
    """Also where what applies the mask is computed again: the mask is saved."""
    torch.manual_seed(0)
    model, x = Dropping(), torch.randn(4, 16)
    (found, next_found), (wanted, next_wanted) = _step(model, x, Plan.parse(text)), _step(model, x, None)
    assert next_found == next_wanted
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6
    graph = _compiled(text, model, x=x).report.step_graph.graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    names = Counter(str(node.target) for node in nodes)
    assert names["graphopt.dropout_mask.default"] == 4 and "aten.native_dropout.default" not in names
    assert {str(n.target) for n in nodes if effect_of(n) is Effect.RANDOM} == {"graphopt.dropout_mask.default"}
    again = {str(node.target) for node in nodes if facts_of(node).made_by == "rematerialize"}
    norms = {"graphopt.add_layer_norm.default", "graphopt.add_rms_norm.default"}
    assert (norms <= again) == ("remat" in text)


def test_what_is_cheap_is_computed_again_first() -> None:
    """Norms and activations, whatever a fused one gives; before matrix products."""
    entry = ZOO["llama"]
    torch.manual_seed(0)
    model, batch = entry.build(), entry.batch()
    again = {}
    for remat in ("0.85", "selective"):
        graph = _compiled(f"kernels=auto,remat={remat}", model, **batch).report.step_graph.graph
        again[remat] = {str(node.target) for node in graph.nodes if facts_of(node).made_by == "rematerialize"}
    assert {"graphopt.gated.default", "graphopt.rms_norm.default"} <= again["0.85"]
    assert not {"aten.mm.default", "graphopt.rotary.default"} & again["0.85"]
    names = ("gated", "rms_norm", "add_rms_norm", "rotary")
    assert {f"graphopt.{name}.default" for name in names} <= again["selective"]
    assert "aten.mm.default" not in again["selective"]


class Squares(Blocks):
    """Gives a number that follows from the logits beside the loss."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss, logits = super().forward(ids, labels)
        return loss, logits.square().mean()


@pytest.mark.parametrize(
    ("build", "loss", "operator"),
    [
        (Blocks, {}, "linear_cross_entropy_part"),
        (Blocks, {"label_smoothing": 0.1}, "linear_cross_entropy_part"),
        (Blocks, {"reduction": "sum"}, "linear_cross_entropy_part"),
        (Blocks, {"reduction": "none"}, "linear_cross_entropy_part"),
        (Blocks, {"dtype": torch.bfloat16}, "cross_entropy_part"),  # the product's result is rounded
        (Squares, {}, "cross_entropy_part"),  # and read elsewhere
    ],
)
def test_a_loss_over_parts_of_the_vocabulary(build: type[Blocks], loss: dict[str, Any], operator: str) -> None:
    """Communication is that of the loss as it is spelled out."""
    model = build(vocabulary=2048, tied=True, logits=build is Squares, **loss)
    batch = tokens(2048, 200)
    plain, fused = (split_program(model, batch, 2, ",column=head", fuse=fuse) for fuse in ("", "behind"))
    called = {name for name in fused.calls if "cross_entropy" in name}
    assert called == {f"graphopt.{operator}{end}.default" for end in ("", "_backward")}
    counts = [sum("all_reduce" in name for name in program.calls) for program in (plain, fused)]
    assert counts[0] == counts[1] > 2
    assert fused.run().distance(eager_step(model, batch)) <= (1e-2 if "dtype" in loss else BOUND)


def _of_rank(rank: int, world: int, plans: list[str]) -> list[tuple[Trained, Trained]]:
    """Training under each plan with fused operators, and what it should come to."""
    found = []
    for text in plans:
        plan = Plan.parse(text).resolve(world)
        if plan.pipeline_ranks > 1:
            trained = by_steps("llama", f"{text},kernels=auto", rank, world, STEPS)
            wanted = only_here(trained, eagerly("llama", plan.data_parallel_ranks, plan.microbatches, STEPS))
        else:
            entry, replicas = ZOO["llama"], plan.data_parallel_ranks
            torch.manual_seed(0)
            model, batch = entry.build().train(), entry.batch()
            compiled = graphopt.compile(copy.deepcopy(model), Plan.parse(f"{text},kernels=auto"))
            part = entry.part(batch, rank * replicas // world, replicas)
            trained = train(compiled, part, steps=STEPS)
            wanted = train(model, batch, steps=STEPS)
        found.append((trained, wanted))
    return found


@pytest.mark.parametrize(
    ("count", "plans"),
    [(2, PAIRS), *(pytest.param(*each, marks=pytest.mark.long) for each in ((2, OTHER_PAIRS), (4, FOURS)))],
)
def test_it_trains_as_eager_does(ranks, count: int, plans: list[str]) -> None:
    for answer in ranks(count).run(_of_rank, plans):
        for plan, (found, wanted) in zip(plans, answer, strict=True):
            assert distance(found, wanted) <= BOUND, plan


@pytest.mark.long
def test_inductor_runs_the_operators() -> None:
    torch.manual_seed(0)
    model, x = Dropping().eval(), torch.randn(4, 16)
    found, _ = _step(model, x, Plan(kernels="auto", executor="inductor"))
    wanted, _ = _step(model, x, None)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6


def test_the_report_says_which_variant_computes_each_operator_and_why() -> None:
    model, x = Dropping(), torch.randn(4, 16)
    report = _compiled("kernels=auto", model, x=x).report
    told = {use.operator: use[1:] for use in report.kernels}
    assert told["graphopt.add_layer_norm"] == (2, "cuda", "torch.float32 on cpu, rows of 16")
    assert report.to_dict()["kernels"][0]["variant"] == "cuda"
    assert any(getattr(part, "title", None) == "kernels" for part in report.renderables())
    node = next(node for node in report.forward_graph.graph.nodes if "add_layer_norm" in str(node.target))
    items = [reason for item in node.users for reason in facts_of(item).reasons]
    assert any("by cuda (torch.float32 on cpu, rows of 16)" in reason for reason in items)


def test_the_plan_decides_the_variant_and_the_environment_before_it(monkeypatch) -> None:
    """As the program is compiled: what the environment says later makes no difference."""
    monkeypatch.delenv("GRAPHOPT_KERNELS", raising=False)
    model, x = Dropping(), torch.randn(4, 16)
    exact, fast = (_step(model, x, Plan(kernels=kernels))[0] for kernels in ("reference", "cuda"))
    assert not torch.equal(exact, fast)
    compiled, found = graphopt.compile(copy.deepcopy(model), Plan(kernels="reference")), []
    for asked in ("reference", "cuda"):
        compiled.zero_grad()
        with mode(asked):
            torch.manual_seed(5)
            compiled(x).backward()
        found.append(torch.cat([p.grad.flatten() for p in compiled.parameters()]))
    assert torch.equal(found[0], exact[1:]) and torch.equal(found[1], exact[1:])
    with mode("cuda"):
        assert torch.equal(_step(model, x, Plan(kernels="reference"))[0], fast)
        assert torch.equal(_step(model, x, Plan())[0], fast)
    first, second = (use.variant for use in _compiled("kernels=reference", model, x=x).report.kernels[:2])
    assert first == second == "reference"


def test_what_the_plan_asks_for_and_cannot_be_had_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"kernels=triton, but norms: on cpu, .*; cuda takes it, or auto"):
        _compiled("kernels=triton", Dropping(), x=torch.randn(4, 16))
    with pytest.raises(graphopt.PlanError, match=r"kernels='tritn' .*'triton'"):
        Plan(kernels="tritn")
