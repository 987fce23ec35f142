"""checkpoint: what the model's author wants computed again is, whatever the plan says, and no bit changes."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import graphopt
from bench.live import most_alive
from graphopt.cost.operations import contraction_flops
from graphopt.inspect.differential import check
from graphopt.plan import Plan
from graphopt.report import Report
from tests.support.programs import lowered
from tests.support.training import Trained, same_bits, train
from tests.support.zoo import WITH_DROPOUT, ZOO, Entry

ENTRIES = {"llama": ZOO["llama"], "gpt2 with dropout": WITH_DROPOUT["gpt2"]}


def _built(entry: Entry, is_reentrant: bool | None = False) -> nn.Module:
    """With its layers under checkpoint, or (None) without."""
    torch.manual_seed(0)
    model = entry.build().train()
    if is_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})  # type: ignore[operator]
    return model


@functools.cache
def _llama(is_reentrant: bool | None, remat: str = "", last_layer_alone: bool = False) -> Report:
    """What one rank makes of a Llama."""
    model = _built(ZOO["llama"], is_reentrant)
    if last_layer_alone:
        model.model.layers[0].gradient_checkpointing = False  # type: ignore[union-attr,index]
    return lowered(f"zero=0{remat}", 1, model, **ZOO["llama"].batch())[0].report


def _flops(report: Report) -> int:
    return sum(contraction_flops(node) or 0 for node in report.step_graph.graph.nodes)


def _activations(report: Report) -> int:
    return report.memory.by_category["activations"]


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_checkpointed_llama_saves_as_remat_full_does(is_reentrant: bool) -> None:
    found, full, none = _llama(is_reentrant), _llama(None, ",remat=full"), _llama(None)
    assert _activations(found) <= 1.05 * _activations(full) < 0.5 * _activations(none)
    assert found.memory.peak_bytes <= 1.05 * full.memory.peak_bytes < none.memory.peak_bytes
    assert _flops(found) == _flops(full) > _flops(none)


@pytest.mark.parametrize("remat", ["full", "0.8"])
def test_a_plan_can_only_have_more_computed_again(remat: str) -> None:
    alone, both = (_llama(False, text, last_layer_alone=True) for text in ("", f",remat={remat}"))
    assert _activations(both) < _activations(alone)
    assert both.memory.peak_bytes < alone.memory.peak_bytes
    assert _flops(both) >= _flops(alone)


def test_under_remat_full_nothing_is_computed_once_more() -> None:
    assert _flops(_llama(False, ",remat=full")) == _flops(_llama(None, ",remat=full"))


def test_the_peak_of_a_run_is_as_predicted() -> None:
    model = graphopt.compile(_built(ZOO["llama"]), "zero=0")
    measured = most_alive(model, ZOO["llama"].batch())
    assert measured == graphopt.report(model).memory.peak_bytes < _llama(None).memory.peak_bytes


@pytest.mark.parametrize("name", ENTRIES)
def test_training_is_eager_s_in_every_bit(name: str) -> None:
    entry = ENTRIES[name]
    results = []
    for is_compiled in (False, True):
        model, batch = _built(entry), entry.batch()
        if is_compiled:
            graphopt.compile(model)
        torch.manual_seed(7)
        results.append(train(model, batch, steps=2))
    assert same_bits(results[1], results[0]) == []


def _train_with_and_without(rank: int, world: int) -> list[Trained]:
    entry, results = WITH_DROPOUT["gpt2"], []
    for is_reentrant in (False, None):
        model, batch = _built(entry, is_reentrant), entry.batch()
        graphopt.compile(model, "zero=3,zero.whole_below=64")
        torch.manual_seed(7)
        results.append(train(model, entry.part(batch, rank, world), steps=2))
    return results


def test_on_two_ranks_in_stage_three_no_bit_changes(ranks) -> None:
    for found, wanted in ranks(2).run(_train_with_and_without):
        assert same_bits(found, wanted) == []


@pytest.mark.parametrize("name", ENTRIES)
def test_the_differential_check_finds_no_difference(name: str) -> None:
    plan = Plan.parse("dp=2,zero=3,zero.whole_below=0").resolve(2)
    verdict = check(_built(ENTRIES[name]), (), ENTRIES[name].batch(), plan)
    assert verdict.guilty is None
    (found,) = (each for each in verdict.comparisons if each.name == "checkpoint")
    assert found.worst == 0.0


class _Segments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False).sum()


def test_all_but_the_last_segment_of_a_sequence_are_regions() -> None:
    compilation, _ = lowered("zero=0", 1, _Segments(), x=torch.randn(4, 8))
    (record,) = (each for each in compilation.report.passes if each.name == "checkpoint")
    assert record.changed and record.statistics["regions"] == 1


def test_a_model_without_regions_is_left_as_it_is() -> None:
    compilation, _ = lowered("zero=0", 1)
    (record,) = (each for each in compilation.report.passes if each.name == "checkpoint")
    assert not record.changed and record.statistics == {"regions": 0, "repeated": 0}
