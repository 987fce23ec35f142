"""Programs -> callable functions, by the executor that the plan names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt._torch import FakeTensorMode
from graphopt.emit.check import check_source
from graphopt.emit.inductor import inductor_function
from graphopt.emit.module import EmittedFunction, load_source, write_source
from graphopt.emit.source import python_source
from graphopt.ir import Program
from graphopt.plan import Plan
from graphopt.runtime.state import Runtime
from graphopt.triton_kernels.choice import decided
from graphopt.triton_kernels.registration import family_of


@dataclass
class Emitted:
    """Functions by name, and the Python that says what they do."""

    source: str
    path: Path
    functions: dict[str, EmittedFunction]
    notes: list[str] = field(default_factory=list)


def emit_functions(
    programs: Mapping[str, Program], plan: Plan, fake_mode: FakeTensorMode, *, title: str, name: str, kernels: str
) -> Emitted:
    """Emit each program. The Python source is written in any case: it is what a person reads.

    kernels: how operators that have kernels are computed when a function runs (`graphopt.triton_kernels.choice`).

    Raises VerificationError if the plan asks for checks and the source is not what the programs say.
    """
    source = python_source(dict(programs), title)
    if plan.verify:
        check_source(source, programs)
    path = write_source(source, name)
    functions: dict[str, EmittedFunction] = {}
    if plan.executor == "inductor":
        functions.update((key, inductor_function(program, fake_mode)) for key, program in programs.items())
    else:
        module = load_source(path)
        functions.update((key, getattr(module, key)) for key in programs)
    for key, program in programs.items():
        if any(family_of(node.target) is not None for node in program.compute_nodes()):
            functions[key] = _computing(functions[key], kernels)
    return Emitted(source, path, functions)


def _computing(function: EmittedFunction, kernels: str) -> EmittedFunction:
    """The function, whose operators run as was decided when it was compiled."""

    def call(inputs: list[Any], runtime: Runtime) -> list[Any]:
        with decided(kernels):
            return function(inputs, runtime)

    return call
