"""Regions of torch.utils.checkpoint are seen in whatever way they are entered, and change no bit."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import graphopt
from graphopt.ir import Phase, Program, facts_of
from tests.support.programs import lowered

aten = torch.ops.aten
How = Callable[[nn.Module, torch.Tensor], torch.Tensor]
_region = functools.partial(checkpoint, use_reentrant=False)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.second(torch.tanh(self.first(x)))))


class _Stack(nn.Module):
    """A linear layer and two blocks; `how` calls each of them."""

    def __init__(self, how: How) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = self.how(block, x)
        return x.square().sum()


def _as_it_is(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x)


def _other_kind(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _region(block, x)


def _reentrant(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(block, x, use_reentrant=True)


def _nested(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _region(lambda x: _region(block, x.sin()).cos(), x)


def _stops_gradients(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    def inside(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.abs().amax()
        return block(x) / scale

    return _region(inside, x)


def _inner_hooks(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    def inside(x: torch.Tensor) -> torch.Tensor:
        with saved_tensors_hooks(functools.partial(torch.mul, other=1), functools.partial(torch.mul, other=1)):
            return block(x)

    return _region(inside, x)


def _selective(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, [aten.mm.default])
    return _region(block, x, context_fn=contexts)


def _every_other_tanh(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    seen = 0

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        nonlocal seen
        seen += operator is aten.tanh.default
        is_saved = operator is aten.tanh.default and seen % 2 == 1
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return _region(block, x, context_fn=lambda: create_selective_checkpoint_contexts(policy))


def _in_autocast(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return _region(block, x)


REGIONS = [_other_kind, _reentrant, _nested, _stops_gradients, _inner_hooks]
SELECTIVE = [_selective, _every_other_tanh]


def _trained(how: How, is_compiled: bool) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    model = _Stack(how)
    if is_compiled:
        graphopt.compile(model)
    loss = model(torch.randn(4, 8))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("how", [*REGIONS, *SELECTIVE])
def test_every_bit_is_eager_s(how: How) -> None:
    for wanted, found in zip(_trained(how, False), _trained(how, True), strict=True):
        assert wanted is not None and found is not None and torch.equal(wanted, found)


def _program(how: How) -> Program:
    return lowered("zero=0", 1, _Stack(how), x=torch.randn(4, 8))[1]


def _saved(program: Program) -> list[torch.fx.Node]:
    return [
        node
        for node in program.compute_nodes(Phase.FORWARD)
        if any(user.op != "output" and facts_of(user).phase is Phase.BACKWARD for user in node.users)
    ]


def _names(program: Program) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in _saved(program) if facts_of(node).layer is not None]


@pytest.mark.parametrize("how", [*REGIONS, *SELECTIVE, _in_autocast])
def test_each_block_is_a_region(how: How) -> None:
    for node in _program(how).compute_nodes(Phase.FORWARD):
        facts = facts_of(node)
        if facts.layer is not None:
            assert facts.checkpoint == int(facts.layer.removeprefix("blocks."))
    assert all(facts_of(node).checkpoint is None for node in _program(_as_it_is).compute_nodes())


@pytest.mark.parametrize("how", [_other_kind, _reentrant, _inner_hooks, _in_autocast])
def test_a_region_saves_random_numbers_and_what_it_gives(how: How) -> None:
    assert "tanh.default" in _names(_program(_as_it_is))
    assert set(_names(_program(how))) <= {"add.Tensor", "<built-in function getitem>"}


def test_a_selective_region_saves_what_its_policy_says() -> None:
    assert _names(_program(_selective)).count("mm.default") == 2
    assert _names(_program(_every_other_tanh)).count("tanh.default") == 2
    assert _names(_program(_other_kind)).count("mm.default") == 0


def test_without_gradients_there_is_no_region() -> None:
    with torch.no_grad():
        program = _program(_other_kind)
    assert all(facts_of(node).checkpoint is None for node in program.compute_nodes())


class _FromTheBatch(nn.Module):
    """A reentrant region whose input wants no gradient, which eager leaves without gradients, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=True)).sum()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_region_has_the_gradients_it_has_in_eager() -> None:
    for is_compiled in (False, True):
        model = _FromTheBatch()
        if is_compiled:
            graphopt.compile(model)
        model(torch.randn(4, 8)).backward()
        assert model.first.weight.grad is None and model.second.weight.grad is not None
