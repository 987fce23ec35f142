"""Emitted programs: readable, importable, and freeing what they no longer need."""

import ast
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Plan
from graphopt._torch import TorchDispatchMode
from graphopt.emit.module import load_source
from graphopt.emit.source import literal
from tests.support.programs import Mlp, lowered
from tests.support.training import same_bits, train
from tests.support.zoo import ZOO


def test_the_source_is_a_module_of_two_functions() -> None:
    compilation, _ = lowered("zero=3")
    tree = ast.parse(compilation.report.source)
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] == ["forward", "backward"]
    assert callable(load_source(compilation.report.source_path).forward)
    assert "# layers.0.0" in compilation.report.source


@pytest.mark.parametrize(
    "value", [1, 2.5, float("inf"), -float("inf"), None, True, "a'b", [1, (2,)], {"a": slice(1, None)}]
)
def test_literals_evaluate_to_their_values(value: Any) -> None:
    assert eval(literal(value)) == value


@pytest.mark.parametrize("value", [torch.float32, torch.device("cpu"), torch.contiguous_format, torch.strided])
def test_torch_literals_evaluate_to_their_values(value: Any) -> None:
    assert eval(literal(value)) == value


class _Watched(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.cos(x)
        return x.sum()


def test_values_die_after_their_last_use() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = function(*args, **(kwargs or {}))
            if "cos" in str(function):
                gc.collect()
                alive.append(weakref.ref(out.untyped_storage()))
                most = max(most, sum(reference() is not None for reference in alive))
            return out

    model = graphopt.compile(_Watched())
    with torch.no_grad():
        model(torch.randn(8))
        with Mode():
            model(torch.randn(8))
    assert most == 2, "one is read while the next is written"


def test_inductor_gives_the_same_training() -> None:
    torch.manual_seed(0)
    eager, x = Mlp(), torch.randn(4, 16)
    model = Mlp()
    model.load_state_dict(eager.state_dict())
    graphopt.compile(model, Plan(executor="inductor"))
    wanted, found = train(eager, {"x": x}), train(model, {"x": x})
    for name, parameter in wanted.parameters.items():
        torch.testing.assert_close(found.parameters[name], parameter, rtol=1e-5, atol=1e-6)


def _inductor(rank: int, world: int) -> list[float]:
    results = []
    for executor in ("python", "inductor"):
        torch.manual_seed(0)
        model = Mlp()
        graphopt.compile(model, Plan(zero=3, executor=executor))
        results.append(train(model, {"x": torch.randn(4, 16)}, steps=2).losses)
    return [abs(a - b) for a, b in zip(*results, strict=True)]


def test_inductor_runs_with_collectives(ranks) -> None:
    assert max(ranks(2).run(_inductor)[0]) < 1e-6


def test_compiling_twice_is_deterministic() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ZOO["llama"].build().train()
        runs.append(train(graphopt.compile(model), ZOO["llama"].batch(), steps=1))
    assert same_bits(*runs) == []
