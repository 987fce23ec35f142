"""A compiled step as one Python file that needs only torch: to read, to run, to send to somebody."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt._torch import OpOverload
from graphopt.emit import plain_runtime
from graphopt.emit.index_bounds import index_bound
from graphopt.emit.source import literal, python_source
from graphopt.emit.split import Halves
from graphopt.errors import GraphoptError
from graphopt.ir import InputKind, ParameterLayout, Program
from graphopt.ir.context import OF_RANK
from graphopt.ir.copies import COPIES
from graphopt.ir.values import in_example
from graphopt.runtime import folded
from graphopt.runtime.parts import Parts

_NAMESPACES = frozenset({"aten", "prims", "_c10d_functional"})
_MODULES = frozenset({"_operator", "math", "torch"})

_INTRODUCTION = '''"""{title}

One training step as a program that needs only torch, on a mesh of {mesh}.

    python {name}                         # {ranks} processes on this machine
    torchrun --nproc-per-node {ranks} {name}

Inputs are random, and the same in every run. Each rank's outputs, new buffers and gradients are printed with their
sums, norms and checksums. The file has three parts:

    Tensor … main        what a step runs on: collectives over a mesh of processes, random inputs; `Step.run` is a step
    forward, backward    the step itself, as the compiler emitted it, each value freed after its last use
    STEP                 what goes into both, and what comes out, in order
"""
'''


def standalone_source(
    halves: Halves, mesh: Mapping[str, int], layouts: Mapping[str, ParameterLayout], *, title: str, name: str
) -> str:
    """The source of a program that runs `halves` on all ranks of `mesh`, with random inputs.

    layouts: how parameters lie over the ranks. title: the first line of the file; name: what it will be called there.
    Raises GraphoptError, naming the node, for a call of something that torch alone does not have.
    """
    functions = {"forward": halves.forward} | ({"backward": halves.backward} if halves.backward else {})
    for program in functions.values():
        _check(program)
    ranks = torch.Size(mesh.values()).numel()
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    emitted = python_source(functions, "").splitlines()[1:]
    runtime = _runtime()
    imports = [line for line in emitted if line.startswith("import ") and line not in runtime]
    return "\n".join(
        [
            _INTRODUCTION.format(title=title, mesh=shape, ranks=ranks, name=name),
            *imports,
            *runtime,
            *(line for line in emitted if not line.startswith("import ")),
            *_step(functions, mesh, layouts),
            "",
            'if __name__ == "__main__":',
            "    main(STEP)",
            "",
        ]
    )


def _check(program: Program) -> None:
    for node in program.compute_nodes():
        target: Any = node.target
        known = target.namespace in _NAMESPACES if isinstance(target, OpOverload) else target.__module__ in _MODULES
        if not known and target not in COPIES | OF_RANK:  # those are calls of the runtime
            raise GraphoptError(
                f"{node.name} calls {target}, which torch alone does not have; choose a plan without the pass "
                "that put it there"
            )


def _runtime() -> list[str]:
    """The text of `plain_runtime`, with that of `Parts` and what it needs in place of its import."""
    text = Path(plain_runtime.__file__).read_text(encoding="utf-8").split('"""', 2)[2].lstrip()
    members = [*(each for each in vars(folded).values() if inspect.getmodule(each) is folded), Parts]
    classes = "\n\n".join(["", *map(inspect.getsource, members), ""])
    return text.replace(f"from {Parts.__module__} import Parts\n", classes).splitlines()


def _step(
    functions: Mapping[str, Program], mesh: Mapping[str, int], layouts: Mapping[str, ParameterLayout]
) -> Iterator[str]:
    """The instance of `plain_runtime.Step` that says all there is to say of this step."""
    forward, backward = functions["forward"], functions.get("backward")
    both = [forward] if backward is None else [forward, backward]
    first: dict[tuple[InputKind, str], tuple[Program, fx.Node]] = {}
    for program in both:
        for role, node in program.nodes_of(*InputKind):
            first.setdefault((role.kind, role.name), (program, node))

    def drawn(kind: InputKind) -> dict[str, str]:
        return {name: _tensor(*found) for (each, name), found in first.items() if each is kind}

    parameters = {
        name: _parameter(node, layouts[name])
        for (kind, name), (_, node) in first.items()
        if kind in (InputKind.PARAMETER, InputKind.SHARD)
    }
    constants = {name: _constant(forward.constants[name]) for kind, name in first if kind is InputKind.CONSTANT}
    yield "STEP = Step("
    yield f"    mesh={dict(mesh)!r},"
    yield f"    device={_device(both)!r},"
    yield from _table("parameters", parameters)
    yield from _table("buffers", drawn(InputKind.BUFFER))
    yield from _table("batch", drawn(InputKind.BATCH))
    yield from _table("tangents", drawn(InputKind.TANGENT))
    yield from _table("constants", constants)
    for name in ("forward", "backward"):
        function = functions.get(name)
        yield f"    {name}={name if function is not None else None},"
        yield from _roles(f"{name}_inputs", function.inputs if function is not None else [])
        yield from _roles(f"{name}_outputs", function.outputs if function is not None else [])
    yield ")"
    yield ""


def _table(name: str, entries: Mapping[str, str]) -> Iterator[str]:
    yield f"    {name}={{"
    yield from (f"        {key!r}: {entry}," for key, entry in entries.items())
    yield "    },"


def _roles(name: str, roles: Sequence[Any]) -> Iterator[str]:
    yield f"    {name}=["
    yield from (f"        ({role.kind.value!r}, {role.name!r})," for role in roles)
    yield "    ],"


def _parameter(node: fx.Node, layout: ParameterLayout) -> str:
    where = "" if layout.is_whole else f", axis={layout.axis!r}, dim={layout.dim}"
    dtype = node.meta["val"].dtype if layout.is_whole else layout.dtype
    return f"Parameter({layout.shape!r}, {dtype}{where})"


def _tensor(program: Program, node: fx.Node) -> str:
    value = node.meta["val"]
    shape = tuple(map(in_example, value.shape))
    is_whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    bound = index_bound(program, node) if is_whole else None
    return f"Tensor({shape!r}, {value.dtype}{'' if bound is None else f', high={bound}'})"


def _constant(value: torch.Tensor) -> str:
    wide = value if value.dtype.itemsize >= 4 or not value.is_floating_point() else value.float()
    return f"torch.tensor({literal(wide.tolist())}, dtype={value.dtype}).reshape({tuple(value.shape)!r})"


def _device(programs: Sequence[Program]) -> str:
    """Of the first input."""
    values = (node.meta["val"] for program in programs for node in program.placeholders)
    return str(next((value.device for value in values), "cpu"))
