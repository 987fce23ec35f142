"""Program -> Python source that frees each value after its last use."""

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt._torch import OpOverload
from graphopt.ir import InputKind, OutputKind, Program, facts_of
from graphopt.ir.context import OF_RANK
from graphopt.ir.copies import COPIED_IN, COPIED_OUT, COPY_IN, COPY_OUT
from graphopt.ir.dispatch import ROWS_BACK, ROWS_OUT

collective = torch.ops._c10d_functional


class _Function:
    """The source of one function, written node by node."""

    def __init__(self, program: Program, imports: dict[str, str]) -> None:
        self.program = program
        self.imports = imports
        self.roles = dict(zip(program.placeholders, program.inputs, strict=True))
        self.gradients = {node for _, node in program.results_of(OutputKind.GRADIENT)}
        self.dead_after = _last_uses(program)

    def lines(self, name: str) -> list[str]:
        program = self.program
        lines = [f"def {name}(_inputs, _runtime):"]
        for role, node in zip(program.inputs, program.placeholders, strict=True):
            lines.append(f"    # {node.name}: {role}, {describe(node)}")
        names = [node.name for node in program.placeholders]
        if names:
            lines.append(f"    {', '.join(names)}{',' if len(names) == 1 else ''} = _inputs")
        lines.append("    _inputs.clear()")
        place = None
        for node in program.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            facts = facts_of(node)
            if (facts.module, facts.source) != place:
                place = (facts.module, facts.source)
                lines.append(f"    # {facts.module or 'model'}" + (f" ({facts.source})" if facts.source else ""))
            lines.append(f"    {node.name} = {self._expression(node)}")
            dead = self.dead_after.get(node)
            if dead:
                lines.append(f"    del {', '.join(n.name for n in dead)}")
        lines.append(f"    return [{', '.join(literal(node) for node in program.results)}]")
        return lines

    def _expression(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return f"_runtime.constants[{str(node.target)!r}]"
        special = _SPECIAL.get(node.target)  # type: ignore[arg-type]
        if special is not None:
            return special(self, node)
        arguments = [literal(a) for a in node.args] + [f"{k}={literal(v)}" for k, v in node.kwargs.items()]
        return f"{self._callee(node.target)}({', '.join(arguments)})"

    def _callee(self, target: Any) -> str:
        if isinstance(target, OpOverload):
            path = str(target)
            name = re.sub(r"\W+", "_", path).removesuffix("_default")
            path = f"torch.ops.{path}"
            self.imports[name] = f"{name} = {path}"
            return name
        module = {"_operator": "operator"}.get(target.__module__, target.__module__)
        self.imports[module] = f"import {module}"
        return f"{module}.{target.__name__}"

    def parameter_names(self, sources: Any) -> list[str]:
        """Which parameters the shards given to a gather belong to, looking through casts."""
        names = []
        for source in sources:
            while source not in self.roles:
                source = source.args[0]
            names.append(self.roles[source].name)
        return names


def _gather(function: _Function, node: fx.Node) -> str:
    sources, _, axis = node.args
    if facts_of(node).resident:
        return f"_runtime.refresh({function.parameter_names(sources)!r}, {literal(sources)}, {axis!r})"
    return f"_runtime.collectives.all_gather({literal(sources)}, {axis!r})"


def _reduce_scatter(function: _Function, node: fx.Node) -> str:
    return f"_runtime.collectives.reduce_scatter({literal(node.args[0])}, {node.args[3]!r})"


def _all_reduce(function: _Function, node: fx.Node) -> str:
    return f"_runtime.collectives.all_reduce({literal(node.args[0])}, {node.args[2]!r})"


def _gather_one(function: _Function, node: fx.Node) -> str:
    return f"_runtime.collectives.all_gather([{literal(node.args[0])}], {node.args[2]!r})[0]"


def _reduce_scatter_one(function: _Function, node: fx.Node) -> str:
    return f"_runtime.collectives.reduce_scatter([{literal(node.args[0])}], {node.args[3]!r})[0]"


def _all_reduce_one(function: _Function, node: fx.Node) -> str:
    value, reduction, axis = node.args
    by = "" if reduction == "sum" else f", {reduction!r}"
    return f"_runtime.collectives.all_reduce([{literal(value)}], {axis!r}{by})[0]"


def _all_to_all(function: _Function, node: fx.Node) -> str:
    return f"_runtime.collectives.all_to_all({literal(node.args[0])}, {node.args[3]!r})[0]"


def _dispatch(function: _Function, node: fx.Node) -> str:
    return _rows_moved("dispatch", node)


def _combine(function: _Function, node: fx.Node) -> str:
    return _rows_moved("combine", node)


def _rows_moved(name: str, node: fx.Node) -> str:
    value, ends, rows, _, axis = node.args
    return f"_runtime.collectives.{name}({literal(value)}, {literal(ends)}, {literal(rows)}, {axis!r})[0]"


def _of_rank(function: _Function, node: fx.Node) -> str:
    """What depends on the rank: the program is the same text on all of them."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    return f"_runtime.parts.{name}({', '.join(map(literal, node.args))})"


def _item(function: _Function, node: fx.Node) -> str:
    return f"{literal(node.args[0])}[{literal(node.args[1])}]"


def _wait(function: _Function, node: fx.Node) -> str:
    return f"{literal(node.args[0])}.wait()"


def _copy_out(function: _Function, node: fx.Node) -> str:
    """A gradient stays where it goes, as a tensor; anything else comes back."""
    value, place = node.args
    (wait,) = node.users
    if wait in function.gradients:
        return f"_runtime.copies.stored({literal(value)}, {place!r})"
    return f"_runtime.copies.out({literal(value)}, {place!r}, {literal(value)!r})"


def _copy_in(function: _Function, node: fx.Node) -> str:
    kept = node.args[0]
    assert isinstance(kept, fx.Node)
    role = function.roles.get(kept)
    is_stored = role is not None and role.kind is not InputKind.SAVED
    return f"_runtime.copies.{'fetched' if is_stored else 'back'}({literal(kept)})"


_SPECIAL: dict[Any, Callable[[_Function, fx.Node], str]] = {
    operator.getitem: _item,
    collective.wait_tensor.default: _wait,
    collective.all_gather_into_tensor_coalesced.default: _gather,
    collective.reduce_scatter_tensor_coalesced.default: _reduce_scatter,
    collective.all_reduce_coalesced.default: _all_reduce,
    collective.all_gather_into_tensor.default: _gather_one,
    collective.reduce_scatter_tensor.default: _reduce_scatter_one,
    collective.all_reduce.default: _all_reduce_one,
    collective.all_to_all_single.default: _all_to_all,
    ROWS_OUT: _dispatch,
    ROWS_BACK: _combine,
    **dict.fromkeys(OF_RANK, _of_rank),
    COPY_OUT: _copy_out,
    COPIED_OUT: _wait,
    COPY_IN: _copy_in,
    COPIED_IN: _wait,
}


def python_source(functions: dict[str, Program], title: str) -> str:
    """A module with one function for each program: ``name(_inputs, _runtime) -> list``.

    _inputs: the inputs in the order of the program's roles; the list is emptied, so that the function alone decides
    how long each lives. _runtime: gives the collectives and the resident parameters (`graphopt.runtime.Runtime`).
    """
    imports: dict[str, str] = {"torch": "import torch"}
    bodies = ["\n".join(_Function(program, imports).lines(name)) for name, program in functions.items()]
    modules = sorted(line for line in imports.values() if line.startswith("import"))
    operators = sorted(line for line in imports.values() if not line.startswith("import"))
    return "\n".join([f'"""{title}"""', "", *modules, "", *operators, "", "", "\n\n\n".join(bodies), ""])


def describe(node: fx.Node) -> str:
    """Dtype and shape of a node's value, such as ``float32[2, 64]``."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__


def literal(value: Any) -> str:
    """Python source for an argument of a node."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        items = ", ".join(map(literal, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({literal(value.start)}, {literal(value.stop)}, {literal(value.step)})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else f"float({str(value)!r})"
    return repr(value)


def _last_uses(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """For each call node, the values that nothing reads after it."""
    alive = {node for node in program.results if node is not None}
    dead_after: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(list(program.graph.nodes)):
        if node.op in ("placeholder", "output"):
            continue
        ended = [source for source in node.all_input_nodes if source not in alive]
        if node not in alive and not node.users:
            ended.append(node)
        alive.update(node.all_input_nodes)
        if ended:
            dead_after[node] = ended
    return dead_after
