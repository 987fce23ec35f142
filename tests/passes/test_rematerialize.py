"""rematerialize: what is saved, what it costs, and that no bit changes."""

import pytest
import torch

from graphopt import Plan, Remat
from graphopt.cost.memory import memory
from graphopt.cost.operations import contraction_flops
from graphopt.errors import PassError, PlanError
from graphopt.inspect.differential import check
from graphopt.ir import Effect, Phase, Program, effect_of, facts_of
from graphopt.lowering import Compilation, lower
from tests.support.inspected import inspected
from tests.support.zoo import WITH_DROPOUT, ZOO, Entry

MODELS = {**{name: ZOO[name] for name in ("llama", "t5", "vit", "mixtral")}, "gpt2 with dropout": WITH_DROPOUT["gpt2"]}
POLICIES = ("full", "selective")


def _compiled(entry: Entry, plan: str) -> tuple[Compilation, Program]:
    programs: list[Program] = []
    compilation = lower(
        entry.build(),
        (),
        entry.batch(),
        Plan.parse(plan).resolve(2),
        observer=lambda _, program: programs.append(program),
    )
    return compilation, programs[-1]


def _flops(program: Program) -> int:
    return sum(contraction_flops(node) or 0 for node in program.compute_nodes())


def _saved(program: Program) -> list[torch.fx.Node]:
    return [
        node
        for node in program.compute_nodes(Phase.FORWARD)
        if any(user.op != "output" and facts_of(user).phase is Phase.BACKWARD for user in node.users)
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_changes(name: str, policy: str) -> None:
    entry = MODELS[name]
    plan = Plan.parse(f"dp=2,zero=3,zero.whole_below=0,remat={policy}").resolve(2)
    verdict = check(entry.build(), (), entry.batch(), plan)
    assert verdict.guilty is None
    (found,) = (each for each in verdict.comparisons if each.name == "rematerialize")
    assert found.worst == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_of_layers_only_what_others_read_and_random_numbers_are_saved(name: str) -> None:
    _, program = _compiled(MODELS[name], "dp=2,zero=3,remat=full")
    for node in _saved(program):
        layer = facts_of(node).layer
        if layer is not None:
            readers = {facts_of(user).layer for user in node.users if user.op != "output"}
            drawn = [source for source in (node, *node.all_input_nodes) if effect_of(source) is Effect.RANDOM]
            assert readers != {layer} or drawn, f"{node.name} is saved by {layer} for itself"


@pytest.mark.parametrize("name", MODELS)
def test_selective_repeats_no_multiplication_and_full_at_most_a_forward(name: str) -> None:
    none, selective, full = (
        _flops(_compiled(MODELS[name], f"dp=2,zero=3{remat}")[1]) for remat in ("", ",remat=selective", ",remat=full")
    )
    forward = sum(contraction_flops(n) or 0 for n in _compiled(MODELS[name], "dp=2")[1].compute_nodes(Phase.FORWARD))
    assert selective == none < full <= none + forward


@pytest.mark.parametrize("name", MODELS)
def test_less_is_saved_the_less_the_policy_keeps(name: str) -> None:
    none, selective, full = (
        memory(_compiled(MODELS[name], f"dp=2,zero=3{remat}")[1], {"dp": 2}).by_category["activations"]
        for remat in ("", ",remat=selective", ",remat=full")
    )
    assert full < selective < none


def test_a_llama_layer_saves_its_input_alone() -> None:
    """Closed form: of each of two layers the float32 input [8, 16, 64]."""
    _, program = _compiled(ZOO["llama"], "dp=2,remat=full")
    inside = [node for node in _saved(program) if facts_of(node).layer is not None]
    hidden = [node for node in inside if tuple(node.meta["val"].shape) == (8, 16, 64)]
    assert len(inside) == len(hidden) <= 2


def test_a_module_may_be_kept() -> None:
    kept = _saved(_compiled(ZOO["llama"], "dp=2,remat=full,remat.keep=[model.layers.0.mlp*]")[1])
    modules = {facts_of(node).module for node in kept}
    assert any(module.startswith("model.layers.0.mlp") for module in modules)
    assert not any(module.startswith("model.layers.1.mlp") for module in modules)


def test_gathered_parameters_are_not_saved_and_reasons_are_told() -> None:
    found = inspected("llama", "dp=2,zero=3,remat=full,zero.whole_below=0")
    for node in _saved(found.program):
        assert "wait_tensor" not in str(node.target)
    repeated = [record for record in found.stages[-1].nodes if record.facts.made_by == "rematerialize"]
    assert repeated and all("policy=full computes it again" in record.facts.reasons[0] for record in repeated)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(PlanError, match=r"remat.policy='ful'.*'full'"):
        Remat("ful")
    with pytest.raises(PlanError, match="no list of patterns"):
        Remat(keep=True)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="no repeated layers"):
        _compiled(ZOO["odd"], "dp=2,remat=full")
