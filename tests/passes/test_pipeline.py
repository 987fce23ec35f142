"""Pipelines as text, their order, and what they catch."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphopt.errors import PassError, VerificationError
from graphopt.ir import Level, Program
from graphopt.passes import REGISTRY, NoOptions, Pass, PassContext
from graphopt.passes.pipeline import Pipeline
from tests.support.programs import Mlp, lowered

TEXTS = [
    "canonicalize,differentiate",
    "canonicalize,differentiate,zero,bucket{bytes=8MiB},schedule{prefetch=2}",
    "differentiate,precision,zero{stage=1,keep=a.*|b}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_pipeline_prints_what_parses_to_it(text: str) -> None:
    assert str(Pipeline.parse(text, REGISTRY)) == text
    assert str(Pipeline.parse(text.replace(",", " , "), REGISTRY)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalise", "no pass named 'canonicalise'; the nearest is 'canonicalize'"),
        ("zero{stag=1}", "zero has no option 'stag'; the nearest is 'stage'"),
        ("zero{stage=5}", "the nearest is 3"),
        ("zero{stage=x}", "stage=x is not of type int"),
        ("zero{stage}", "has no value"),
        ("zero{stage=1", "cannot be read from"),
        ("zero{stage=1,stage=2}", "option 'stage' twice"),
    ],
)
def test_text_that_is_no_pipeline(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message.replace("{", "\\{")):
        Pipeline.parse(text, REGISTRY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero", "zero needs differentiate"),
        ("differentiate", "differentiate needs canonicalize"),
        ("canonicalize,differentiate,canonicalize", "canonicalize works on forward programs"),
        ("canonicalize,differentiate,zero,precision", "precision cannot run after zero"),
        ("canonicalize,differentiate,zero,zero", "zero cannot run after zero"),
        ("canonicalize,differentiate,zero,bucket,bucket", "bucket cannot run after bucket"),
        ("canonicalize,differentiate,zero,schedule,schedule", "schedule cannot run after schedule"),
        ("canonicalize,bucket", "bucket needs differentiate"),
    ],
)
def test_an_order_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text, REGISTRY).check(Level.FORWARD)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            "precision=bf16,passes=canonicalize,differentiate,zero",
            "as they are stored.*computes in bf16; add precision",
        ),
        ("passes=canonicalize,differentiate", "each rank its own gradients; add zero"),
    ],
)
def test_a_pipeline_that_does_not_do_what_the_plan_asks(plan: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        lowered(plan)


def test_records_say_what_each_pass_did() -> None:
    compilation, _ = lowered("zero=3,zero.whole_below=0")
    names = [record.name for record in compilation.report.passes]
    assert names == ["canonicalize", "state_causal", "differentiate", "checkpoint", "zero", "bucket", "schedule"]
    zero = compilation.report.passes[4]
    assert zero.changed and zero.statistics["sharded"] == 3 and zero.nodes_after > zero.nodes_before


def test_the_user_may_replace_the_pipeline() -> None:
    compilation, _ = lowered("zero=3,zero.whole_below=0,passes=canonicalize,differentiate,zero{stage=3}")
    assert [record.name for record in compilation.report.passes] == ["canonicalize", "differentiate", "zero"]
    assert compilation.report.communication.calls["all-gather", "dp"] == 6


@dataclasses.dataclass(frozen=True)
class _Options:
    count: int = 1
    limit: int | None = None
    rate: float = 0.5
    eager: bool = False
    pattern: str = ""
    frame_bytes: int = 1 << 20


class _Typed(Pass):
    """Has an option of every type there is."""

    name = "typed"
    level = Level.STEP
    produces = Level.STEP
    Options = _Options

    def run(self, program: Program, context: PassContext) -> bool:
        return False


@given(
    st.builds(
        _Options,
        count=st.integers(-5, 5),
        limit=st.none() | st.integers(0, 9),
        rate=st.floats(allow_nan=False),
        eager=st.booleans(),
        pattern=st.text("abz.*|=", max_size=4),
        frame_bytes=st.integers(0, 1 << 42),
    )
)
def test_options_of_every_type_survive_text(options: _Options) -> None:
    text = str(Pipeline([_Typed(options), _Typed()]))
    again = Pipeline.parse(text, {"typed": _Typed})
    assert [step.options for step in again.passes] == [options, _Options()] and str(again) == text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("count=1.5", "count=1.5 is not of type int; write count=a whole number, or a size such as 8MiB"),
        ("limit=many", "limit=many is not of type int"),
        ("rate=fast", "rate=fast is not of type float; write rate=a number"),
        ("eager=yes", "eager=yes is not of type bool; write eager=true or false"),
    ],
)
def test_a_value_of_another_type_is_told_what_would_do(option: str, message: str) -> None:
    with pytest.raises(PassError, match=re.escape(message)):
        Pipeline.parse(f"typed{{{option}}}", {"typed": _Typed})


def test_sizes_are_whole_numbers() -> None:
    (step,) = Pipeline.parse("typed{frame_bytes=1.5MiB,count=2KiB}", {"typed": _Typed}).passes
    assert step.options == _Options(frame_bytes=3 << 19, count=2048)


def test_a_program_that_was_broken_before_is_not_blamed_on_a_pass() -> None:
    compilation, program = lowered("zero=0", world=1)
    program.inputs.pop()
    with pytest.raises(VerificationError, match=r"^before the first pass: "):
        Pipeline([_Typed()]).run(program, PassContext(compilation.captured.fake_mode, {"dp": 1}, {}), verify=True)


class _Liar(Pass):
    """Negates the first result of a step and says that it did nothing."""

    name = "liar"
    level = Level.STEP
    produces = Level.STEP
    Options = NoOptions
    value_dtype: torch.dtype | None = None

    def run(self, program: Program, context: PassContext) -> bool:
        (result, *others) = program.results
        assert result is not None
        with program.graph.inserting_before(program.output_node):
            negated = program.graph.call_function(torch.ops.aten.neg.default, (result,))
        negated.meta = dict(result.meta)
        if self.value_dtype is not None:
            negated.meta["val"] = result.meta["val"].to(self.value_dtype)
        program.set_results([negated, *others], program.outputs)
        return self.value_dtype is not None


class _WrongDtype(_Liar):
    name = "wrong_dtype"
    value_dtype = torch.float64


@pytest.mark.parametrize(
    ("kind", "message"), [(_Liar, "says that it changed nothing"), (_WrongDtype, "after wrong_dtype.*is stated")]
)
def test_verification_names_the_pass_at_fault(kind: type[Pass], message: str) -> None:
    compilation, program = lowered("zero=0", world=1)
    context = PassContext(compilation.captured.fake_mode, {"dp": 1}, {})
    with pytest.raises(VerificationError, match=message):
        Pipeline([kind()]).run(program, context, verify=True)


def test_options_are_frozen() -> None:
    for kind in REGISTRY.values():
        assert dataclasses.is_dataclass(kind.Options)
        assert isinstance(kind(), Pass) and isinstance(Mlp(), nn.Module)
