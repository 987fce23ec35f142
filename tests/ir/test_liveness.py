"""Storages and their lives, against what torch does when the program really runs."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from graphopt.cost.memory import memory
from graphopt.ir import Program
from graphopt.ir.liveness import intervals, own_results, storage_of
from tests.ir.built import Hand, functional, real_inputs, run, storage_bytes
from tests.support.programs import lowered
from tests.support.zoo import CONVNET, ZOO

aten = torch.ops.aten


class _Pieces(nn.Module):
    """Splits, unbinds and reshapes, some of them in place of the storage and some with a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).split(16, -1)
        first, second, *_ = q.unbind(0)
        wide = x.expand(3, *x.shape).contiguous()
        mixed = ((q + k) * v).transpose(0, 1).reshape(-1)
        return mixed.sum() + first.dot(second) + wide.sum() + torch.einsum("bs,ts->bt", x, x).sum()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "pieces": (_Pieces, lambda: {"x": torch.rand(4, 16, requires_grad=True)}),
    "convnet": (CONVNET.build, CONVNET.batch),
    **{name: (ZOO[name].build, ZOO[name].batch) for name in ("llama", "gpt2", "t5", "mamba")},
}


@pytest.mark.parametrize("name", MODELS)
def test_owners_are_who_allocates_when_the_program_runs(name: str) -> None:
    build, batch = MODELS[name]
    _, program = lowered("zero=0", 1, model=build(), **batch())
    owner = storage_of(program)
    kept, first = [], dict[int, fx.Node]()
    inputs = dict(zip(program.placeholders, real_inputs(program), strict=True))
    for node, value in inputs.items():
        first[_address(value)] = node
    for node, values in run(program, list(inputs.values())):
        value = values[node]
        if isinstance(value, torch.Tensor) and value.numel():
            kept.append(value)  # so that no address is used twice
            assert owner[node] is first.setdefault(_address(value), node), node.format_node()


def _address(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


@given(st.data())
def test_bytes_alive_are_those_of_a_run_that_frees_after_the_last_use(data: st.DataObject) -> None:
    program = _drawn(data)
    inputs = real_inputs(program)
    after, during = [], [storage_bytes(dict(zip(program.placeholders, inputs, strict=True)))]
    *nodes, _ = program.graph.nodes
    calls = [n for n in nodes if n.op == "call_function"]
    for index, (_, values) in enumerate(run(program, inputs)):
        during.append(storage_bytes(values))
        read = {s for n in calls[index + 1 :] for s in n.all_input_nodes} | set(program.output_node.all_input_nodes)
        after.append(storage_bytes({n: v for n, v in values.items() if n in read or n.op == "placeholder"}))
    found = memory(program, {"dp": 2})
    assert found.timeline == after
    assert found.peak_bytes == max(during)


def _drawn(data: st.DataObject) -> Program:
    """A program of ops that allocate, view, and split, over matrices of one size."""
    hand = Hand()
    values = [hand.input(4, 6), hand.input(4, 6)]
    pick = st.integers(0, 1000).map(lambda number: values[number % len(values)])
    for _ in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["neg", "add", "view", "unsafe_view", "turn", "split", "slice"]))
        value = data.draw(pick)
        if kind == "neg":
            values.append(hand.call(aten.neg.default, value))
        elif kind == "add":
            values.append(hand.call(aten.add.Tensor, value, data.draw(pick)))
        elif kind == "turn":  # a view, then a copy that reshape must make
            turned = hand.call(aten.t.default, value)
            values.append(hand.call(aten.reshape.default, hand.call(aten.clone.default, turned), [4, 6]))
        elif kind == "split":
            halves = hand.call(aten.split.Tensor, value, 2)
            both = [hand.call(operator.getitem, halves, index) for index in range(2)]
            values.append(hand.call(aten.cat.default, both))
        elif kind == "slice":
            values.append(hand.call(aten.cat.default, [hand.call(aten.slice.Tensor, value, 0, 0, 2)] * 2))
        else:
            target = aten.view.default if kind == "view" else aten._unsafe_view.default
            flat = hand.call(target, hand.call(aten.clone.default, value), [24])
            values.append(hand.call(target, flat, [4, 6]))
    return hand.program(*data.draw(st.lists(pick, min_size=1, max_size=2, unique=True)))


def test_items_of_a_collective_are_storages_that_start_with_it() -> None:
    hand = Hand()
    one, two = hand.input(2, 3), hand.input(4, 3)
    launched = hand.call(functional.all_gather_into_tensor_coalesced.default, [one, two], 2, "dp")
    first, second = hand.waited(launched, 0), hand.waited(launched, 1)
    total = hand.call(aten.sum.default, first)
    program = hand.program(total, second)
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    owner = storage_of(program)
    assert owner[first] is first.args[0] and owner[second] is second.args[0] and owner[launched] is launched
    assert [(i.owner, i.first, i.last) for i in intervals(program)] == [
        (first.args[0], position[launched], position[total]),
        (second.args[0], position[launched], None),
        (total, position[total], None),
    ]


def test_own_results_are_those_with_a_storage_to_themselves() -> None:
    hand = Hand()
    x = hand.input(4, 4)
    turned = hand.call(aten.t.default, x)
    fresh = hand.call(aten.t.default, hand.call(aten.neg.default, x))
    half = hand.call(aten.slice.Tensor, hand.call(aten.neg.default, x), 0, 0, 2)
    wide = hand.call(aten.expand.default, hand.call(aten.sum.dim_IntList, x, [0], True), [4, 4])
    twice = hand.call(aten.neg.default, x)
    program = hand.program(turned, fresh, half, wide, twice, hand.call(aten.t.default, twice))
    assert own_results(program) == {fresh}
