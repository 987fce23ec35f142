"""Any small module, split in any way, does what it does on one device."""

import dataclasses

from hypothesis import given, note, settings
from hypothesis import strategies as st

from graphopt.errors import PassError
from tests.support.drawn.example import Example
from tests.support.drawn.script import runnable
from tests.support.drawn.strategies import examples
from tests.support.split import eager_step, split_program

BOUND = 1e-9  # in float64
WAYS = ("", ",sequence=true", ",along=sequence", ",along=heads")
WITH_A_LOSS = ("loss", "loss and rows", "dict", "without gradient", "the input", "a number of its own")


@st.composite
def _examples(draw: st.DrawFn) -> Example:
    """With one loss, from which gradients start."""
    example = draw(examples((1,)))
    return dataclasses.replace(example, ending=draw(st.sampled_from(WITH_A_LOSS)), leaf=False)


@settings(max_examples=settings.default.max_examples // 2)
@given(example=_examples(), ranks=st.sampled_from([2, 3]), way=st.sampled_from(WAYS))
def test_a_split_step_computes_what_the_module_does(example: Example, ranks: int, way: str) -> None:
    subject = runnable(example)
    model = subject.build().double()
    batch = {name: t.double() if t.is_floating_point() else t for name, t in subject.batch(0, 0).items()}
    note(example.source())
    try:
        split = split_program(model, batch, ranks, way)
    except PassError as error:
        assert "nothing can be split" in str(error)
        return
    assert split.run().distance(eager_step(model, batch)) <= BOUND
