"""A pass that fails leaves all it takes to see it fail again, and its own error is what the caller sees."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.errors import GraphoptError, PassError, VerificationError
from graphopt.inspect.replay import message_of
from graphopt.ir import Level, Program
from graphopt.ir.printer import format_program
from graphopt.lowering import lower
from graphopt.passes import REGISTRY, Pass, PassContext
from graphopt.passes.pipeline import Pipeline
from graphopt.passes.reproducer import Reproducer
from graphopt.plan import Plan
from tests.support.programs import Mlp
from tests.support.zoo import ZOO


class Raises(Pass):
    """Fails half way through a rewrite."""

    name = "raises"
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})

    def run(self, program: Program, context: PassContext) -> bool:
        program.graph.erase_node(program.output_node)
        raise KeyError("no such layer\nmore of it")


class Breaks(Raises):
    """Leaves a program that the verifier refuses."""

    name = "breaks"

    def run(self, program: Program, context: PassContext) -> bool:
        node = next(n for n in program.compute_nodes() if n.target is torch.ops.aten.tanh.default)
        node.meta["val"] = node.meta["val"].double()
        return True


class Misused(Raises):
    """Raises an error of graphopt's own."""

    name = "misused"

    def run(self, program: Program, context: PassContext) -> bool:
        raise PassError("misused: say how")


KINDS = {kind.name: kind for kind in (Raises, Breaks, Misused)}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_ARTIFACTS", str(tmp_path))


def failed(text: str, registry: dict[str, type[Pass]] | None = None) -> GraphoptError:
    """The error of a compilation under a plan, two ranks."""
    call = {"x": torch.randn(4, 16)}
    with pytest.raises(GraphoptError) as caught:
        lower(Mlp(), (), call, Plan.parse(text).resolve(2), registry=registry or {**REGISTRY, **KINDS})
    return caught.value


def folder_of(error: GraphoptError) -> Path:
    """The folder that an error names."""
    (note,) = error.__notes__
    before, _, folder = note.partition("graphopt-inspect replay ")
    assert before == "reproduce it with: "
    return Path(folder)


PLAN = "zero=3,zero.whole_below=0,precision=bf16,passes=canonicalize,differentiate,precision,{},zero{{stage=3}},bucket"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("raises", PassError, "raises failed: KeyError: 'no such layer"),
        ("breaks", VerificationError, "after breaks: tanh is stated to be float64"),
        ("misused", PassError, "misused: say how"),
    ],
)
def test_a_failure_leaves_a_folder(name: str, kind: type[GraphoptError], message: str, tmp_path: Path) -> None:
    error = failed(PLAN.format(name))
    assert type(error) is kind and str(error).startswith(message)
    assert (
        message_of(error).splitlines()[0].endswith(f"; reproduce it with: graphopt-inspect replay {folder_of(error)}")
    )
    assert folder_of(error).parent == tmp_path
    files = {path.name: path.read_text() for path in folder_of(error).iterdir()}
    assert sorted(files) == ["error.txt", "program.json", "program.txt", "reproducer.json"]
    assert "Traceback" in files["error.txt"] and message in files["error.txt"]
    made = Reproducer.load(folder_of(error))
    assert made.pipeline == f"{name},zero,bucket" and made.done == ("canonicalize", "differentiate", "precision")
    assert made.error == (kind.__name__, str(error))
    assert set(made.versions) == {"python", "torch", "graphopt", "platform"}
    assert made.places[name] == f"{__name__}:{KINDS[name].__name__}"
    assert format_program(made.program) == files["program.txt"]
    assert made.registry()[name] is KINDS[name] and made.registry()["zero"] is REGISTRY["zero"]


def test_an_exception_stays_the_cause() -> None:
    assert isinstance(failed(PLAN.format("raises")).__cause__, KeyError)
    assert failed(PLAN.format("misused")).__cause__ is None


def test_the_program_and_the_context_are_those_before_the_pass() -> None:
    """A pass fails half way; from what it left, the passes before it and after it lead to where they always do."""
    plan = Plan.parse("zero=3,zero.whole_below=0,precision=bf16").resolve(2)
    texts: list[str] = []
    compilation = lower(
        Mlp(), (), {"x": torch.randn(4, 16)}, plan, observer=lambda _, p: texts.append(format_program(p))
    )
    made = Reproducer.load(folder_of(failed(PLAN.format("raises"))))
    assert made.context.layouts == compilation.layouts and made.context.mesh == {"dp": 2}
    assert made.context.gradient_outputs == {"0"} and made.context.reduce_gradients
    assert made.context.reduce_dtype is torch.float32 and format_program(made.program) == texts[4]
    rest = Pipeline.parse("zero{stage=3},bucket,schedule", REGISTRY)
    rest.run(made.program, made.context, verify=True, done=made.done)
    assert format_program(made.program) == texts[-1]


def test_the_same_failure_is_written_once(tmp_path: Path) -> None:
    assert folder_of(failed(PLAN.format("raises"))) == folder_of(failed(PLAN.format("raises")))
    assert len(list(tmp_path.iterdir())) == 1


def test_what_keeps_a_reproducer_from_being_written_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHOPT_ARTIFACTS", str(tmp_path / "file"))
    error = failed(PLAN.format("raises"))
    assert str(error).startswith("raises failed: KeyError")
    assert error.__notes__[0].startswith("no reproducer could be written: FileExistsError")


def test_what_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwritable(Raises):
        name = "unwritable"

        def run(self, program: Program, context: PassContext) -> bool:
            program.compute_nodes()[0].target = lambda *args: None
            return True

    plan = "zero=0,verify=false,passes=canonicalize,differentiate,unwritable,raises,zero"
    error = failed(plan, {**REGISTRY, **KINDS, "unwritable": Unwritable})
    assert "no reproducer could be written: GraphoptError:" in error.__notes__[0]
    assert "neither an operator nor a function" in error.__notes__[0]


def _edited(folder: Path, **changes: Any) -> Path:
    path = folder / "reproducer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def _broken(how: str, folder: Path) -> Path:
    program = folder / "program.json"
    if how == "gone":
        return folder.parent / folder.name.replace("raises", "raise")
    if how == "no program":
        program.rename(folder / "program.jsn")
    elif how == "cut off":
        program.write_text(program.read_text()[:200])
    elif how == "no nodes":
        program.write_text(json.dumps({"symbols": {}}))
    elif how == "no operator":
        program.write_text(program.read_text().replace("aten.tanh.default", "aten.tanhh.default"))
    elif how == "format":
        return _edited(folder, format=0)
    elif how == "no module":
        return _edited(folder, places={"raises": "no_such_module:Raises"})
    elif how == "no class":
        return _edited(folder, places={"raises": f"{__name__}:Raised"})
    elif how == "no pass":
        return _edited(folder, places={"raises": f"{__name__}:ZOO"})
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("gone", ["there is no folder", "the nearest is", "reproducer_raises"]),
        ("no program", ["is no reproducer", "no program.json", "'program.jsn'"]),
        ("cut off", ["program.json is damaged"]),
        ("no nodes", ["is damaged (KeyError: 'nodes')"]),
        ("no operator", ["no operator aten.tanhh.default"]),
        ("format", ["format 0", "reads 2"]),
        ("no module", ["'raises'", "No module named 'no_such_module'"]),
        ("no class", ["'raises'", "Raised", "choose from canonicalize"]),
        ("no pass", ["which is no pass now"]),
    ],
)
def test_a_folder_that_cannot_be_replayed_is_one_line(how: str, words: list[str]) -> None:
    folder = _broken(how, folder_of(failed(PLAN.format("raises"))))
    with pytest.raises(GraphoptError) as caught:
        Reproducer.load(folder).registry()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_program_with_symbols_fails_again_elsewhere() -> None:
    plan = Plan.parse("zero=3,dynamic=batch,passes=canonicalize,differentiate,raises,zero").resolve(2)
    with pytest.raises(PassError) as caught:
        lower(ZOO["odd"].build(), (), ZOO["odd"].batch(), plan, registry={**REGISTRY, **KINDS})
    assert "s" in json.loads((folder_of(caught.value) / "program.json").read_text())["symbols"].popitem()[0]
    with pytest.raises(PassError, match="raises failed"):
        made = Reproducer.load(folder_of(caught.value))
        Pipeline.parse(made.pipeline, made.registry()).run(made.program, made.context, verify=True, done=made.done)
