"""Timelines: what repeating values would do to a step, without rewriting it, is what it does."""

import operator
import random

import pytest
from torch import fx

from graphopt.cost.memory import memory
from graphopt.cost.operations import work_of
from graphopt.cost.repetition import Outcome, Timeline, repetitions
from graphopt.ir import Effect, Phase, Program, effect_of
from graphopt.ir.snapshot import copied
from graphopt.passes.base import PassContext
from graphopt.passes.build import Builder
from graphopt.passes.repeat import repeat_in_backward
from tests.support.programs import lowered
from tests.support.zoo import WITH_DROPOUT, ZOO

MODELS = {**{name: ZOO[name] for name in ("llama", "mixtral", "odd")}, "gpt2 with dropout": WITH_DROPOUT["gpt2"]}
STEP = "passes=canonicalize,differentiate"


def _flops(node: fx.Node) -> float:
    return float(work_of(node).flops)


def _some_of(program: Program, chance: random.Random) -> list[fx.Node]:
    """Pure forward calls, any half of them; an item of a list goes with the call that gives the list."""
    chosen: dict[fx.Node, None] = {}
    for node in program.compute_nodes(Phase.FORWARD):
        is_item = node.target is operator.getitem
        if effect_of(node) is Effect.PURE and (node.args[0] in chosen if is_item else chance.random() < 0.5):
            chosen[node] = None
    return list(chosen)


@pytest.mark.parametrize("name", MODELS)
def test_an_outcome_is_that_of_the_rewritten_step(name: str) -> None:
    entry = MODELS[name]
    compilation, program = lowered(STEP, 1, entry.build(), **entry.batch())
    context = PassContext(compilation.captured.fake_mode, {"dp": 1}, compilation.layouts)
    timeline = Timeline(program, _flops, lambda node: None)
    peaks = set()
    for seed in range(8):
        choice = _some_of(program, random.Random(seed)) if seed else []
        rewritten = copied(program)
        names = {node.name for node in choice}
        repeat_in_backward(
            Builder(rewritten, context, "test"), [n for n in rewritten.graph.nodes if n.name in names], ""
        )
        outcome = timeline.after(choice)
        assert outcome.peak_bytes == memory(rewritten, {"dp": 1}).peak_bytes, seed
        assert outcome.seconds == sum(map(_flops, rewritten.compute_nodes())), seed
        peaks.add(outcome.peak_bytes)
    assert len(peaks) > 1


def test_each_value_is_computed_again_once_before_its_first_reader() -> None:
    reads = {1: [], 2: [1], 3: [2], 10: [3], 11: [2], 12: [1, 3]}
    found = dict(repetitions([10, 11, 12], reads.__getitem__, {1, 2, 3}))
    assert found == {10: [1, 2, 3], 11: [], 12: []}
    found = dict(repetitions([11, 10, 12], reads.__getitem__, {2, 3}))
    assert found == {11: [2], 10: [3], 12: []}


def test_what_is_as_good_in_both_beats() -> None:
    assert Outcome(1, 1.0).beats(Outcome(1, 2.0)) and Outcome(1, 1.0).beats(Outcome(1, 1.0))
    assert not Outcome(1, 2.0).beats(Outcome(2, 1.0))
