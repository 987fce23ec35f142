"""The four operators of a copy, on fake and on real tensors, and how a program's copies are found."""

import pytest
import torch
from torch import fx

from graphopt._torch import new_fake_mode
from graphopt.ir import Effect, Program, effect_of
from graphopt.ir.copies import COPIED_IN, COPIED_OUT, COPIES, COPY_IN, COPY_LAUNCHES, COPY_OUT, COPY_WAITS, copies_of
from graphopt.ir.printer import format_program
from tests.ir.built import Hand, real_inputs, run

CPU = torch.device("cpu")
VALUES = {
    "plain": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "bfloat16": torch.arange(5).bfloat16(),
    "bool": torch.tensor([True, False]),
    "no dimension": torch.tensor(3),
    "no elements": torch.empty(0, 4),
}


def _there_and_back(value: torch.Tensor, place: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What is elsewhere, and what came back."""
    kept = COPIED_OUT(COPY_OUT(value, place), value)
    return kept, COPIED_IN(COPY_IN(kept, value.device, place), kept)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("name", VALUES)
def test_one_after_the_other_they_give_the_value_in_its_strides(name: str, place: str) -> None:
    value = VALUES[name]
    for found in _there_and_back(value, place):
        assert torch.equal(found, value) and found.dtype == value.dtype and found.stride() == value.stride()
        assert found.numel() == 0 or found.data_ptr() != value.data_ptr()


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("name", VALUES)
def test_fake_values_are_on_the_cpu_while_they_are_elsewhere(name: str, device: str) -> None:
    with new_fake_mode():
        real = VALUES[name]
        value = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
        kept, back = _there_and_back(value, "disk")
        assert (kept.device, back.device) == (CPU, value.device)
        for found in (kept, back):
            assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("name", VALUES)
def test_operators_do_for_real_what_their_fakes_say(name: str) -> None:
    value = VALUES[name]
    for operator, *args in ((COPY_OUT, value, "host"), (COPY_IN, value, CPU, "host")):
        torch.library.opcheck(operator, tuple(args), test_utils=("test_schema", "test_faketensor"))


def test_each_is_a_copy_that_may_be_repeated_and_launches_and_waits_are_told_apart() -> None:
    program = _there_and_back_by_hand("host")
    assert {effect_of(node) for node in program.compute_nodes()} == {Effect.COPY}
    assert frozenset({COPY_OUT, COPY_IN}) == COPY_LAUNCHES == COPIES - COPY_WAITS
    assert frozenset({COPIED_OUT, COPIED_IN}) == COPY_WAITS == COPIES - COPY_LAUNCHES


def _moved(hand: Hand, value: fx.Node, place: str) -> fx.Node:
    kept = hand.call(COPIED_OUT, hand.call(COPY_OUT, value, place), value)
    return hand.call(COPIED_IN, hand.call(COPY_IN, kept, CPU, place), kept)


def _there_and_back_by_hand(place: str) -> Program:
    hand = Hand()
    return hand.program(_moved(hand, hand.input(3, 4), place))


def test_copies_of_a_program_in_the_order_of_their_launch() -> None:
    hand = Hand()
    first, second = hand.input(3, 4), hand.input(5)
    program = hand.program(_moved(hand, first, "host"), _moved(hand, second, "disk"))
    found = copies_of(program)
    assert [copy.link for copy in found] == ["to host", "from host", "to disk", "from disk"]
    assert [copy.is_out for copy in found] == [True, False, True, False]
    assert all(copy.wait.args[0] is copy.launch for copy in found)


def test_a_program_run_call_by_call_gives_the_values() -> None:
    program = _there_and_back_by_hand("disk")
    inputs = real_inputs(program)
    *_, (last, values) = run(program, inputs)
    assert last.target is COPIED_IN and torch.equal(values[last], inputs[0])


def test_places_are_part_of_the_text() -> None:
    program = _there_and_back_by_hand("disk")
    assert format_program(program).count("disk)") == 2
