"""bucket: one collective for several parameters, so that latency is paid once and links are filled.

Gradients that came in one bucket are summed over the next axis in one as well.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir import Level, Phase, Program, explain, facts_of
from graphopt.ir.collectives import sources_of
from graphopt.passes.base import Pass, PassContext, Tier
from graphopt.passes.build import Builder
from graphopt.passes.reductions import by_level, list_sums, reduced_before

collective = torch.ops._c10d_functional

GATHER = collective.all_gather_into_tensor_coalesced.default
_SMALLEST = 1 << 20


@dataclass(frozen=True)
class BucketOptions:
    """bytes: of whole parameters (or gradients) that one collective moves at most; 0 for those of a repeated layer."""

    bytes: int = 0


class Bucket(Pass):
    """Merge gathers of parameters, or sums of gradients, of one axis, dtype and phase, up to a number of bytes."""

    name = "bucket"
    Options = BucketOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"bucket", "schedule", "offload_state", "overlap"})
    # A ring sums the parts of a bucket in an order that depends on their place in it.
    tier = Tier.REASSOCIATES
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        listed = list_sums(Builder(program, context, self.name))
        limit = self.options.bytes or layer_bytes(program)
        gathers = [node for node in program.compute_nodes() if node.target is GATHER]
        buckets = [bucket for kind in _alike(gathers) for bucket in _packed(kind, limit)]
        for bucket in buckets:
            _merge_gathers(bucket)
        for level in by_level(program.compute_nodes()):
            position = {node: i for i, node in enumerate(program.graph.nodes)}
            reductions = [bucket for kind in _alike(level) for bucket in _packed(kind, limit)]
            for bucket in reductions:
                _merge_reductions(bucket, position)
            buckets += reductions
        context.statistics.update(collectives=sum(map(len, buckets)), buckets=len(buckets), bytes=limit)
        return bool(listed) or any(len(bucket) > 1 for bucket in buckets)


def layer_bytes(program: Program) -> int:
    """Bytes of parameters that a typical repeated layer gathers in forward, or reduces where nothing is gathered."""
    layers: defaultdict[str, int] = defaultdict(int)
    total = 0
    nodes = [n for n in program.compute_nodes(Phase.FORWARD) if n.target is GATHER]
    for node in nodes or next(iter(by_level(program.compute_nodes())), []):
        total += whole_bytes(node)
        layer = facts_of(node).layer
        if layer is not None:
            layers[layer] += whole_bytes(node)
    typical = int(statistics.median(layers.values())) if layers else total // 4
    return max(typical, _SMALLEST)


def whole_bytes(node: fx.Node) -> int:
    """Bytes of the whole tensors that a collective moves: its results if it gathers, else its arguments."""
    values = node.meta["val"] if node.target is GATHER else [source.meta["val"] for source in sources_of(node)]
    return sum(value.numel() * value.element_size() for value in values)


def _alike(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Collectives that may share a bucket, in order."""
    kinds: defaultdict[tuple[object, ...], list[fx.Node]] = defaultdict(list)
    for node in nodes:
        facts = facts_of(node)
        lifetime = (facts.phase, facts.resident, facts.kept)
        before = None if node.target is GATHER else reduced_before(node)
        kinds[node.target, node.args[1:], node.meta["val"][0].dtype, lifetime, before].append(node)
    return list(kinds.values())


def _packed(nodes: list[fx.Node], limit: int) -> Iterator[list[fx.Node]]:
    """Runs of `nodes` of at most `limit` bytes each; a run that is half full ends with its layer."""
    bucket: list[fx.Node] = []
    filled = 0
    for node in nodes:
        size = whole_bytes(node)
        new_layer = bool(bucket) and facts_of(node).layer != facts_of(bucket[-1]).layer
        if bucket and (filled + size > limit or (new_layer and filled * 2 >= limit)):
            yield bucket
            bucket, filled = [], 0
        bucket.append(node)
        filled += size
    if bucket:
        yield bucket


def _merge_gathers(bucket: list[fx.Node]) -> None:
    """Gather everything where the first was gathered, and wait for everything there."""
    first, *others = bucket
    sources = sources_of(first)
    (item,) = first.users
    (last,) = item.users
    for node in others:
        (source,) = sources_of(node)
        if source.op == "call_function":
            first.prepend(source)
        (item,) = node.users
        (wait,) = item.users
        item.args = (first, len(sources))
        sources.append(source)
        last.append(item)
        item.append(wait)
        last = wait
        node.graph.erase_node(node)
    _reset(first, sources, "the first is needed")


def _merge_reductions(bucket: list[fx.Node], position: dict[fx.Node, int]) -> None:
    """Reduce everything where the last was reduced, when all arguments are there."""
    *others, last = sorted(bucket, key=position.__getitem__)
    (item,) = last.users
    sources = sources_of(last)
    tail = _tail(item)
    for node in others:
        (source,) = sources_of(node)
        (item,) = node.users
        item.args = (last, len(sources))
        sources.append(source)
        anchor = tail[-1]
        tail = _tail(item)
        for moved in tail:
            anchor.append(moved)
            anchor = moved
        node.graph.erase_node(node)
    _reset(last, sources, "the last is complete")


def _tail(node: fx.Node) -> list[fx.Node]:
    """`node` and the chain of its users up to the program's output."""
    chain = [node]
    while len(chain[-1].users) == 1 and next(iter(chain[-1].users)).op != "output":
        chain.append(next(iter(chain[-1].users)))
    return chain


def _reset(node: fx.Node, sources: list[fx.Node], moment: str) -> None:
    """Give a merged collective its arguments; its value is the list of its items' values."""
    if len(sources) > 1:
        explain(node, Bucket.name, f"{len(sources)} in one, where {moment}, so that latency is paid once")
    node.args = (sources, *node.args[1:])
    values: list[object] = [None] * len(sources)
    for item in node.users:
        values[item.args[1]] = item.meta["val"]  # type: ignore[index, call-overload]
    node.meta["val"] = values
