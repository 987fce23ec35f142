"""One stage of a pipeline: what it runs of a forward program, what it receives and what it sends."""

import torch
from torch import fx

from graphopt._torch import FakeTensorMode
from graphopt.ir import Input, InputKind, Output, OutputKind, Program, annotate
from graphopt.passes.crossing import Row
from graphopt.passes.rewrite import remove_dead


def keep_stage(program: Program, row: Row, first: int, behind: int, fake_mode: FakeTensorMode) -> None:
    """Leave of `program` the calls of `row` from place `first` to before place `behind`.

    What those before give is received, what those behind read is sent on, in the order in which it is made: `name`s of
    these roles are those of the calls. An output of the model is returned by the stage that makes it; by the last, if
    that is all of them.
    """
    received = row.crossing(first)
    sent = row.crossing(behind)
    is_last = behind == len(row.calls)
    results: list[tuple[Output, fx.Node | None]] = [
        (role, node)
        for role, node in program.results_of(*OutputKind)
        if (first <= row.place[node] < behind if node in row.place else is_last)
    ]
    results += [(Output(OutputKind.SENT, node.name, node in row.tracked), node) for node in sent]
    with fake_mode:
        arrived = {node: _receive(program, node, node in row.tracked) for node in received}
    for node, placeholder in arrived.items():
        node.replace_all_uses_with(placeholder, lambda user: user.op != "output")
    nodes = [arrived.get(node, node) if node is not None else None for _, node in results]
    program.set_results(nodes, [role for role, _ in results])
    for node in reversed(row.calls):
        if not first <= row.place[node] < behind:
            program.graph.erase_node(node)
    remove_dead(program)
    for role, node in list(zip(program.inputs, program.placeholders, strict=True)):
        if not node.users and role.kind is not InputKind.RECEIVED:
            program.remove_input(node)


def _receive(program: Program, node: fx.Node, requires_grad: bool) -> fx.Node:
    value = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)  # however it was sent
    placeholder = program.add_input(Input(InputKind.RECEIVED, node.name, requires_grad), value)
    return annotate(placeholder, like=node)
