"""Pipelines as text, their order, and what they catch."""

import dataclasses

import pytest
import torch
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
    ],
)
def test_text_that_is_no_pipeline(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message.replace("{", "\\{")):
        Pipeline.parse(text, REGISTRY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero", "zero needs differentiate"),
        ("differentiate,canonicalize", "canonicalize works on forward programs"),
        ("differentiate,zero,precision", "precision cannot run after zero"),
        ("differentiate,bucket", "bucket needs zero"),
    ],
)
def test_an_order_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text, REGISTRY).check(Level.FORWARD)


def test_records_say_what_each_pass_did() -> None:
    compilation, _ = lowered("zero=3,zero.whole_below=0")
    names = [record.name for record in compilation.report.passes]
    assert names == ["canonicalize", "differentiate", "zero", "bucket", "schedule"]
    zero = compilation.report.passes[2]
    assert zero.changed and zero.statistics["sharded"] == 3 and zero.nodes_after > zero.nodes_before


def test_the_user_may_replace_the_pipeline() -> None:
    compilation, _ = lowered("zero=3,zero.whole_below=0,passes=differentiate,zero{stage=3}")
    assert [record.name for record in compilation.report.passes] == ["differentiate", "zero"]
    assert compilation.report.communication.calls["all-gather", "dp"] == 6


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
