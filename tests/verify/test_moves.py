"""What the verifier allows of collectives that move a model's own values, and what it does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from graphopt.errors import VerificationError
from graphopt.ir import InputKind, Output, OutputKind, ParameterLayout, Phase, Program, annotate
from graphopt.verify.value_numbers import ValueNumbers
from graphopt.verify.verifier import verify
from tests.ir.built import Hand, functional

aten = torch.ops.aten
MESH = {"tp": 2, "dp": 2}
GATHER, REDUCE = functional.all_gather_into_tensor.default, functional.all_reduce.default
EXCHANGE = functional.all_to_all_single.default


def _awaited(hand: Hand, target: Callable[..., Any], *args: Any) -> fx.Node:
    return hand.call(functional.wait_tensor.default, hand.call(target, *args))


def _late(node: fx.Node) -> fx.Node:
    for each in (node, *node.all_input_nodes):
        if each.op == "call_function":
            annotate(each, phase=Phase.BACKWARD)
    return node


def _read_late(kind: InputKind) -> tuple[Hand, Program]:
    """What forward gathers, read in backward: the value of a batch, or a shard."""
    hand = Hand()
    gathered = _awaited(hand, GATHER, hand.input(3, kind=kind), 2, "tp")
    product = annotate(hand.call(aten.mul.Tensor, gathered, gathered), phase=Phase.BACKWARD)
    program = hand.program(product)
    program.set_results([product], [Output(OutputKind.BATCH_GRADIENT, "x0")])
    return hand, program


def test_a_gathered_value_may_be_saved_and_a_gathered_parameter_may_not() -> None:
    hand, program = _read_late(InputKind.BATCH)
    verify(program, hand.mode, MESH)
    hand, program = _read_late(InputKind.SHARD)
    with pytest.raises(VerificationError, match="in backward, which was gathered for forward alone"):
        verify(program, hand.mode, MESH)


def test_only_forward_takes_maxima() -> None:
    hand = Hand()
    verify(hand.program(_awaited(hand, REDUCE, hand.input(3), "max", "tp")), hand.mode, MESH)
    hand = Hand()
    late = _late(_awaited(hand, REDUCE, hand.input(3), "max", "tp"))
    program = hand.program(late)
    program.set_results([late], [Output(OutputKind.BATCH_GRADIENT, "x0")])
    with pytest.raises(VerificationError, match="reduces by 'max'; gradients are summed"):
        verify(program, hand.mode, MESH)


@pytest.mark.parametrize(("received", "sent"), [([1, 1, 1], [1, 1, 1]), ([2, 1], [1, 2])])
def test_ranks_exchange_as_much_with_each(received: list[int], sent: list[int]) -> None:
    hand = Hand()
    verify(hand.program(_awaited(hand, EXCHANGE, hand.input(2, 3), [1, 1], [1, 1], "tp")), hand.mode, MESH)
    hand = Hand()
    program = hand.program(_awaited(hand, EXCHANGE, hand.input(sum(sent), 3), received, sent, "tp"))
    with pytest.raises(VerificationError, match="rows on axis tp, which has 2 ranks"):
        verify(program, hand.mode, MESH)


def test_what_differs_between_ranks_has_a_number_of_its_own() -> None:
    """And the same exchange, repeated, has the same."""
    hand = Hand()
    x = hand.input(2, 3)
    different = [
        _awaited(hand, EXCHANGE, x, [1, 1], [1, 1], "tp"),
        _awaited(hand, EXCHANGE, x, [1, 1], [1, 1], "dp"),
        _awaited(hand, REDUCE, x, "sum", "tp"),
        _awaited(hand, REDUCE, x, "max", "tp"),
        _awaited(hand, GATHER, x, 2, "tp"),
        _awaited(hand, GATHER, x, 2, "dp"),
    ]
    again = _awaited(hand, EXCHANGE, x, [1, 1], [1, 1], "tp")
    numbers = ValueNumbers({}).of(hand.program(*different, again))
    assert len({numbers[node] for node in (x, *different)}) == 7 and numbers[again] == numbers[different[0]]


def _mean(first: str) -> tuple[Hand, Program, ParameterLayout]:
    """A gradient that is summed over an axis, and then is the mean over dp."""
    hand = Hand()
    tangent = hand.input(4, kind=InputKind.TANGENT, name="y")
    summed = _late(_awaited(hand, REDUCE, tangent, "sum", first))
    total = _late(_awaited(hand, REDUCE, summed, "sum", "dp"))
    mean = annotate(hand.call(aten.div.Tensor, total, 2), phase=Phase.BACKWARD)
    program = hand.program(mean)
    program.set_results([mean], [Output(OutputKind.GRADIENT, "weight")])
    program.reduced = True
    return hand, program, ParameterLayout.choose("weight", (4,), torch.float32, "dp", 2, whole=True)


def test_a_mean_may_be_of_sums_over_another_axis() -> None:
    hand, program, layout = _mean("tp")
    verify(program, hand.mode, MESH, {"weight": layout})
    hand, program, layout = _mean("dp")
    with pytest.raises(VerificationError, match="is summed over dp twice"):
        verify(program, hand.mode, MESH, {"weight": layout})
