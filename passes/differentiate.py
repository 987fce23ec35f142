"""differentiate: forward graph -> step graph, forward and backward in one flat ATen graph.

The forward graph is run on fake tensors under autograd while every operation is recorded. Which forward node a
backward node belongs to is read from autograd's sequence numbers.
"""

import bisect
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt._torch import sequence_number, trace, traced_graph
from graphopt.ir import Input, InputKind, Level, Output, OutputKind, Phase, Program, annotate
from graphopt.ir.collectives import collective_of, waits_of
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.functionalize import functionalize
from graphopt.passes.rewrite import remove_dead, remove_identities

_DETACHED = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh_copy.default)

_GRADIENTS = {InputKind.BATCH: OutputKind.BATCH_GRADIENT, InputKind.RECEIVED: OutputKind.RECEIVED_GRADIENT}


class Differentiate(Pass):
    """Make every gradient explicit. A program from which no gradient is asked becomes flat, and stays forward."""

    name = "differentiate"
    level = Level.FORWARD
    produces = Level.STEP
    requires = frozenset({"canonicalize"})  # which spells what has no derivative

    def run(self, program: Program, context: PassContext) -> bool:
        recording = _Recording(program, context)
        module = trace(recording.step, recording.arguments(), context.fake_mode)
        recording.annotate_backward(module.graph)
        program.module = module
        program.inputs = recording.inputs
        program.level = Level.STEP
        program.set_results(list(module.graph.output_node().args[0]), recording.outputs)  # type: ignore[arg-type]
        _lift_constants(program)
        _drop_tangents(program, recording.unreached)
        _name_inputs(program)
        _read_sizes_of_what_arrived(program)
        bypassed = _bypass(program)
        context.statistics.update(
            functionalized=functionalize(program),
            backward=len(program.compute_nodes(Phase.BACKWARD)),
            identities=bypassed + remove_identities(program),
            dead=remove_dead(program),
        )
        return True


class _Recording:
    """One run of the forward graph and of autograd over it, with what each recorded node came from."""

    def __init__(self, program: Program, context: PassContext) -> None:
        self.program = program
        self.context = context
        self.inputs = list(program.inputs)
        self.outputs: list[Output] = []
        self.seeded = _seeded_outputs(program, context)
        self.unreached = {program.outputs[index].name for index in self.seeded}
        self.sequence_starts: list[int] = []
        self.sequence_nodes: list[fx.Node] = []
        self.backward_marks: list[tuple[fx.Node, fx.Node | None]] = []

    def arguments(self) -> list[Any]:
        """Fake values for the inputs, those that want a gradient as leaves of autograd, then the tangents."""
        values: list[Any] = []
        with self.context.fake_mode:
            for role, node in zip(self.program.inputs, self.program.placeholders, strict=True):
                # Also where no gradient is asked for: products choose their kernels by whether a weight wants one.
                values.append(node.meta["val"].detach().requires_grad_(role.requires_grad))
            results = self.program.results
            for index in self.seeded:
                result = results[index]
                assert result is not None
                is_sent = self.program.outputs[index].kind is OutputKind.SENT  # what comes back is contiguous
                layout = torch.contiguous_format if is_sent else torch.preserve_format
                values.append(torch.empty_like(result.meta["val"], requires_grad=False, memory_format=layout))
                self.inputs.append(Input(InputKind.TANGENT, self.program.outputs[index].name))
        return values

    @property
    def training(self) -> bool:
        return bool(self.seeded)

    def step(self, *values: Any) -> list[Any]:
        """What is recorded: outputs, then the gradient of each input that wants one."""
        count = len(self.program.inputs)
        inputs, tangents = values[:count], values[count:]
        with torch.set_grad_enabled(self.training):
            results = _Forward(self.program.module, self).run(*inputs)
        self.outputs = [
            replace(role, requires_grad=value.requires_grad) if role.kind is OutputKind.USER else role
            for role, value in zip(self.program.outputs, results, strict=True)
        ]
        if not self.training:
            return list(results)
        reached = [(i, t) for i, t in zip(self.seeded, tangents, strict=True) if results[i].requires_grad]
        if not reached:
            return [value.detach() for value in results]
        wanted = [(role, v) for role, v in zip(self.program.inputs, inputs, strict=True) if role.requires_grad]
        self._mark_backward([results[i] for i, _ in reached])
        gradients = torch.autograd.grad(
            [results[i] for i, _ in reached], [v for _, v in wanted], [t for _, t in reached], allow_unused=True
        )
        self.outputs += [Output(_gradient_kind(role), role.name) for role, _ in wanted]
        self.unreached -= {self.program.outputs[i].name for i, _ in reached}
        return [*(value.detach() for value in results), *gradients]

    def forward_ran(self, node: fx.Node, first: int) -> None:
        """Remember that autograd nodes from number `first` on, until the next call, come from `node`."""
        self.sequence_starts.append(first)
        self.sequence_nodes.append(node)

    def _mark_backward(self, outputs: list[torch.Tensor]) -> None:
        """Before each autograd node runs, note where the recorded graph ends and which forward node it stems from."""
        graph = traced_graph()
        self.backward_marks.append((_last(graph), None))
        todo = [output.grad_fn for output in outputs]
        seen = set(todo)
        while todo:
            function = todo.pop()
            if function is None:
                continue
            position = bisect.bisect_right(self.sequence_starts, function._sequence_nr()) - 1  # type: ignore[attr-defined]
            origin = self.sequence_nodes[position] if position >= 0 else None
            function.register_prehook(lambda _, origin=origin: self.backward_marks.append((_last(graph), origin)))
            fresh = [parent for parent, _ in function.next_functions if parent is not None and parent not in seen]
            seen.update(fresh)
            todo.extend(fresh)

    def annotate_backward(self, graph: fx.Graph) -> None:
        """Give each recorded backward node the facts of the forward node it stems from."""
        marks = dict(self.backward_marks)
        origin = next((o for _, o in self.backward_marks if o is not None), None)
        backward = False
        for node in graph.nodes:
            if backward and node.op == "call_function":
                annotate(node, like=origin, phase=Phase.BACKWARD, made_by="differentiate")
                if origin is not None:
                    annotate(node, origin=origin.name)
            if node in marks:
                backward = True
                origin = marks[node] or origin


class _Forward(fx.Interpreter):
    """Runs the forward graph; what is recorded meanwhile takes the facts of the node that ran."""

    def __init__(self, module: fx.GraphModule, recording: _Recording) -> None:
        super().__init__(module)
        self.recording = recording
        self.traced = traced_graph()

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        last, first = _last(self.traced), sequence_number()
        result = super().run_node(n)
        self.recording.forward_ran(n, first)
        while last.next.op != "root":
            last = annotate(last.next, like=n, origin=n.name)
        return result


def _seeded_outputs(program: Program, context: PassContext) -> list[int]:
    """Indices of the outputs at which a gradient arrives; in training also from later stages of a pipeline."""
    return [
        index
        for index, role in enumerate(program.outputs)
        if (role.kind is OutputKind.USER and role.name in context.gradient_outputs)
        or (role.kind is OutputKind.SENT and role.requires_grad and context.gradient_outputs)
    ]


def _gradient_kind(role: Input) -> OutputKind:
    return _GRADIENTS.get(role.kind, OutputKind.GRADIENT)


def _last(graph: fx.Graph) -> fx.Node:
    return graph.output_node().prev if graph.find_nodes(op="output") else next(iter(reversed(graph.nodes)))


def _lift_constants(program: Program) -> None:
    """Tensors that were made while recording become inputs like the model's own constants."""
    for node in program.graph.find_nodes(op="get_attr"):
        value = getattr(program.module, str(node.target))
        name = f"recorded.{node.target}"
        lifted = program.add_input(Input(InputKind.CONSTANT, name), node.meta.get("val", value))
        program.constants[name] = value
        node.replace_all_uses_with(lifted)
        program.graph.erase_node(node)


def _drop_tangents(program: Program, unreached: set[str]) -> None:
    """No gradient arrives at an output that leads back to no parameter."""
    for role, node in list(program.nodes_of(InputKind.TANGENT)):
        if role.name in unreached:
            program.remove_input(node)


def _name_inputs(program: Program) -> None:
    """Placeholders named after their roles, for the reader."""
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        with program.graph.inserting_before(node):
            named = program.graph.placeholder(role.identifier)
        named.meta = {"val": node.meta["val"].detach()}
        node.replace_all_uses_with(named)
        program.graph.erase_node(node)


def _read_sizes_of_what_arrived(program: Program) -> None:
    """A symbolic size that was first seen at a collective's launch is read where that is waited for."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        launched, dim = node.args
        if isinstance(launched, fx.Node) and collective_of(launched) is not None:
            node.args = (waits_of(launched)[0], dim)


def _bypass(program: Program) -> int:
    """Remove what only autograd needed to see."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target in _DETACHED]
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
    return len(nodes)
