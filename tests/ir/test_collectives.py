"""What collectives move, counted by hand, and what ranks must agree on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from graphopt.ir import Program
from graphopt.ir.collectives import collective_calls, collectives_of
from graphopt.ir.values import byte_size
from tests.ir.built import Hand, functional

MEAN_TIMES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}


def _alone(hand: Hand, value: fx.Node, kind: str, ranks: int) -> fx.Node:
    rows = value.meta["val"].shape[0] // ranks
    launched = {
        "all-gather": lambda: hand.call(functional.all_gather_into_tensor.default, value, ranks, "dp"),
        "reduce-scatter": lambda: hand.call(functional.reduce_scatter_tensor.default, value, "sum", ranks, "dp"),
        "all-reduce": lambda: hand.call(functional.all_reduce.default, value, "sum", "dp"),
        "all-to-all": lambda: hand.call(functional.all_to_all_single.default, value, *[[rows] * ranks] * 2, "dp"),
    }[kind]()
    return hand.call(functional.wait_tensor.default, launched)


def _coalesced(hand: Hand, value: fx.Node, kind: str, ranks: int) -> fx.Node:
    launched = {
        "all-gather": lambda: hand.call(functional.all_gather_into_tensor_coalesced.default, [value], ranks, "dp"),
        "reduce-scatter": lambda: hand.call(
            functional.reduce_scatter_tensor_coalesced.default, [value], "sum", ranks, "dp"
        ),
        "all-reduce": lambda: hand.call(functional.all_reduce_coalesced.default, [value], "sum", "dp"),
    }[kind]()
    return hand.waited(launched, 0)


@pytest.mark.parametrize(
    ("build", "kind"),
    [*((_alone, kind) for kind in MEAN_TIMES), *((_coalesced, kind) for kind in list(MEAN_TIMES)[:3])],
)
@given(rows=st.integers(1, 5), ranks=st.integers(1, 9))
def test_bytes_are_the_least_that_can_move(build: Callable[..., fx.Node], kind: str, rows: int, ranks: int) -> None:
    """`ranks` ranks with `rows` rows of 3 float32 each, or a whole of all their rows to be summed or exchanged."""
    hand = Hand()
    value = hand.input(rows if kind == "all-gather" else rows * ranks, 3)
    (found,) = collectives_of(hand.program(build(hand, value, kind, ranks)))
    assert (found.kind, found.axis) == (kind, "dp")
    assert found.sent_bytes(ranks) == pytest.approx(MEAN_TIMES[kind] * (ranks - 1) * rows * 3 * 4)


def _pair(change: Callable[[list[Any]], None] = lambda calls: None, width: int = 3) -> Program:
    hand = Hand()
    value = hand.input(4, width)
    calls: list[Any] = [
        (functional.all_gather_into_tensor.default, 2, "dp"),
        (functional.all_reduce.default, "sum", "dp"),
    ]
    change(calls)
    made = [hand.call(functional.wait_tensor.default, hand.call(op, value, *args)) for op, *args in calls]
    return hand.program(*made)


def test_the_signature_is_that_of_what_is_exchanged() -> None:
    def reorder(calls: list[Any]) -> None:
        calls.reverse()

    def other_axis(calls: list[Any]) -> None:
        calls[0] = (calls[0][0], 2, "tp")

    def other_ranks(calls: list[Any]) -> None:
        calls[0] = (calls[0][0], 4, "dp")

    def other_sum(calls: list[Any]) -> None:
        calls[1] = (calls[1][0], "max", "dp")

    def one_less(calls: list[Any]) -> None:
        calls.pop()

    programs = [_pair(), *map(_pair, (reorder, other_axis, other_ranks, other_sum, one_less)), _pair(width=5)]
    assert len({"\n".join(collective_calls(program)) for program in programs}) == len(programs)
    assert collective_calls(_pair()) == collective_calls(_pair())


def test_the_size_of_a_symbol_is_that_of_the_example_and_adds_no_guard() -> None:
    hand = Hand()
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
    value = hand.mode.from_tensor(torch.empty(6, 5), symbolic_context=context)
    assert byte_size(value) == 6 * 5 * 4 and byte_size([value, value, None]) == 2 * 6 * 5 * 4
    node = hand.input(1, 1)
    node.meta["val"] = value
    reduced = hand.call(functional.wait_tensor.default, hand.call(functional.all_reduce.default, node, "sum", "dp"))
    assert [c.whole_bytes for c in collectives_of(hand.program(reduced))] == [6 * 5 * 4]
    assert isinstance(value.shape[0], torch.SymInt) and hand.mode.shape_env is not None
    assert not hand.mode.shape_env.guards
