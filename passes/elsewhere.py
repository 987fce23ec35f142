"""Keeping forward values elsewhere until backward reads them."""

from collections.abc import Collection

import torch
from torch import fx

from graphopt.ir import Effect, InputKind, Phase, Program, effect_of, explain
from graphopt.ir.copies import COPIED_IN, COPIED_OUT, COPY_IN, COPY_OUT
from graphopt.ir.liveness import storage_of
from graphopt.ir.values import is_dense
from graphopt.passes.build import Builder
from graphopt.passes.repeat import repeat_in_backward


def movable(program: Program) -> set[fx.Node]:
    """Forward values that backward reads, in storage that forward could leave: the calls that allocate it.

    What is returned stays anyway, and what is made of weights alone is made again from them.
    """
    owner = storage_of(program)
    stays = {owner[node] for node in program.results if node is not None}
    stays |= _made_of_weights(program)
    found = {
        owner[source]
        for node in program.compute_nodes(Phase.BACKWARD)
        for source in node.all_input_nodes
        if source.op == "call_function" and owner[source].op == "call_function"
    }
    forward = set(program.compute_nodes(Phase.FORWARD))
    return {node for node in found & forward - stays if _is_plain(node.meta.get("val"))}


def keep_elsewhere(builder: Builder, values: Collection[fx.Node], place: str, reason: str) -> int:
    """Copy `values`, calls that allocate storage, to `place` where they are made, and back where backward reads them.

    place: ``host`` or ``disk``. Views of them are taken again in backward. reason: why, for the reader. Returns how
    many are moved. Each copy is waited for at once; `overlap` moves launches and waits apart.
    """
    program = builder.program
    owner = storage_of(program)
    views = [n for n in program.compute_nodes(Phase.FORWARD) if owner[n] in values and owner[n] is not n]
    repeat_in_backward(builder, views, f"a view of {place} memory is taken when the value is back")
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    backward = set(program.compute_nodes(Phase.BACKWARD))
    moved = 0
    for value in sorted(values, key=order.__getitem__):
        readers = [user for user in value.users if user in backward]
        if not readers:
            continue
        first = min(readers, key=order.__getitem__)
        back = _moved(builder, value, place, first)
        for node in (back, *back.all_input_nodes):
            explain(node, builder.made_by, reason)
        for reader in readers:
            reader.replace_input_with(value, back)
        moved += 1
    return moved


def _moved(builder: Builder, value: fx.Node, place: str, first: fx.Node) -> fx.Node:
    """The value as it is when it has left, and come back before `first` reads it."""
    with builder.after(value):
        leaving = builder.call(COPY_OUT, value, place, like=value, phase=Phase.FORWARD)
    with builder.after(leaving):
        kept = builder.call(COPIED_OUT, leaving, value, like=value, phase=Phase.FORWARD)
    with builder.before(first):
        arriving = builder.call(COPY_IN, kept, value.meta["val"].device, like=value, phase=Phase.BACKWARD)
        return builder.call(COPIED_IN, arriving, kept, like=value, phase=Phase.BACKWARD)


def _made_of_weights(program: Program) -> set[fx.Node]:
    made = {node for _, node in program.nodes_of(InputKind.PARAMETER, InputKind.SHARD, InputKind.BUFFER)}
    for node in program.compute_nodes(Phase.FORWARD):
        sources = node.all_input_nodes
        if sources and effect_of(node) is Effect.PURE and all(source in made for source in sources):
            made.add(node)
    return made


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and is_dense(value)
