"""Keeping forward values elsewhere until backward reads them."""

from collections.abc import Collection

import torch
from torch import fx

from graphopt.cost.hardware import Hardware
from graphopt.errors import PassError
from graphopt.ir import Effect, InputKind, Phase, Program, annotate, effect_of, explain, facts_of
from graphopt.ir.copies import COPIED_IN, COPIED_OUT, COPY_IN, COPY_OUT, PLACES
from graphopt.ir.liveness import storage_of
from graphopt.ir.values import byte_size, is_dense
from graphopt.nearest import nearest
from graphopt.passes.build import Builder
from graphopt.passes.repeat import made_of, repeat_in_backward


def movable(program: Program, least_bytes: int) -> set[fx.Node]:
    """Forward calls that allocate at least so much, which may leave until backward.

    What is returned stays anyway, and what is made of weights alone is made again from them.
    """
    owner = storage_of(program)
    inputs = program.nodes_of(InputKind.PARAMETER, InputKind.SHARD, InputKind.BUFFER)
    stays = {owner[node] for node in program.results if node is not None}
    stays |= made_of(program, (node for _, node in inputs))
    return {
        node
        for node in program.compute_nodes(Phase.FORWARD)
        if owner[node] is node and node not in stays and effect_of(node) is not Effect.COLLECTIVE
        if is_worth_moving(node.meta.get("val"), least_bytes)
    }


def is_worth_moving(value: object, least_bytes: int) -> bool:
    """Whether it is a tensor large enough to be copied; one of elements that lie apart would be another tensor."""
    return isinstance(value, torch.Tensor) and byte_size(value) >= max(1, least_bytes) and is_dense(value)


def check_place(owner: str, place: str) -> None:
    """Raises PassError if there is no such place. owner: the pass with that option."""
    if place not in PLACES:
        raise PassError(f"{owner}: there is no place {place!r}; {nearest(place, PLACES)}")


def frees_memory(place: str, hardware: Hardware) -> bool:
    """Whether what is there takes no memory of the device; on a CPU, the host's is its own."""
    return place != "host" or not hardware.shares_host


def keep_elsewhere(builder: Builder, values: Collection[fx.Node], place: str, reason: str) -> list[fx.Node]:
    """Copy `values`, calls that allocate storage, to `place` where they are made, and back where backward reads them.

    place: ``host`` or ``disk``. Views of them are taken again in backward. reason: why, for the reader. Returns those
    that backward reads, which are moved. Each copy is waited for at once; `overlap` moves launches and waits apart.
    """
    program = builder.program
    owner = storage_of(program)
    views = [n for n in program.compute_nodes(Phase.FORWARD) if owner[n] in values and owner[n] is not n]
    repeat_in_backward(builder, views, f"a view of {place} memory is taken when the value is back")
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    backward = set(program.compute_nodes(Phase.BACKWARD))
    moved = []
    for value in sorted(order.keys() & values, key=order.__getitem__):
        readers = [user for user in value.users if user in backward]
        if not readers:
            continue
        first = min(readers, key=order.__getitem__)
        back = _moved(builder, value, place, first)
        explain(back, builder.made_by, reason)
        for reader in readers:
            reader.replace_input_with(value, back)
        moved.append(value)
    return moved


def _moved(builder: Builder, value: fx.Node, place: str, first: fx.Node) -> fx.Node:
    """The value as it is when it has left, and come back before `first` reads it."""
    kept = send_away(builder, value, place)
    with builder.before(first):
        return bring_back(builder, kept, place, like=value, phase=Phase.BACKWARD)


def send_away(builder: Builder, value: fx.Node, place: str) -> fx.Node:
    """A copy of `value` at `place`, made just after it and waited for at once."""
    phase = facts_of(value).phase
    with builder.after(value):
        leaving = builder.call(COPY_OUT, value, place, like=value, phase=phase)
    annotate(leaving, outside=frees_memory(place, builder.context.hardware))
    with builder.after(leaving):
        return builder.call(COPIED_OUT, leaving, value, like=value, phase=phase)


def bring_back(builder: Builder, kept: fx.Node, place: str, *, like: fx.Node, phase: Phase) -> fx.Node:
    """What is kept at `place`, in memory of the device that `like` is on; goes where the builder inserts."""
    arriving = builder.call(COPY_IN, kept, like.meta["val"].device, place, like=like, phase=phase)
    return builder.call(COPIED_IN, arriving, kept, like=like, phase=phase)
