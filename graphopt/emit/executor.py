"""Programs -> callable functions, by the executor that the plan names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from graphopt._torch import FakeTensorMode
from graphopt.emit.check import check_source
from graphopt.emit.inductor import inductor_function
from graphopt.emit.module import EmittedFunction, load_source, write_source
from graphopt.emit.source import python_source
from graphopt.ir import Program
from graphopt.plan import Plan


@dataclass
class Emitted:
    """Functions by name, and the Python that says what they do."""

    source: str
    path: Path
    functions: dict[str, EmittedFunction]
    notes: list[str] = field(default_factory=list)


def emit_functions(
    programs: Mapping[str, Program], plan: Plan, fake_mode: FakeTensorMode, *, title: str, name: str
) -> Emitted:
    """Emit each program. The Python source is written in any case: it is what a person reads.

    Raises VerificationError if the plan asks for checks and the source is not what the programs say.
    """
    source = python_source(dict(programs), title)
    if plan.verify:
        check_source(source, programs)
    path = write_source(source, name)
    if plan.executor == "inductor":
        return Emitted(source, path, {key: inductor_function(program, fake_mode) for key, program in programs.items()})
    module = load_source(path)
    return Emitted(source, path, {key: getattr(module, key) for key in programs})
