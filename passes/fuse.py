"""fuse: one operator with a kernel for what a model spells out in several."""

from collections.abc import Hashable, Iterator

from torch import fx

from graphopt.ir import Level, Program, explain
from graphopt.passes.base import Pass, PassContext, Tier
from graphopt.passes.build import Builder
from graphopt.passes.patterns import (
    activations,
    attention,
    class_parallel,
    cross_entropy,
    experts,
    norms,
    rotary,
    routing,
    softmax,
)
from graphopt.passes.patterns.fusion import Fusion, Site, Writer, varying_of
from graphopt.passes.rewrite import remove_dead
from graphopt.triton_kernels.choice import decided, mode_of_kernels

# What is larger goes first, where several fit.
FUSIONS: tuple[Fusion, ...] = (
    *cross_entropy.FUSIONS,
    *class_parallel.FUSIONS,
    *experts.FUSIONS,
    *routing.FUSIONS,
    *attention.FUSIONS,
    *rotary.FUSIONS,
    *softmax.FUSIONS,
    *activations.FUSIONS,
    *norms.FUSIONS,
)


class Fuse(Pass):
    """Puts in operators of `graphopt.triton_kernels` for what they compute, where they have a kernel.

    A pattern is found up to the order of operands, casts and views, if nothing else reads its inner values and all of
    it belongs to one layer. It is for tensors of which a kernel takes dtype, width and device, as
    `graphopt.triton_kernels.choice` says. Runs behind the passes that split a model: they know operators of torch.
    """

    name = "fuse"
    level = Level.FORWARD
    produces = Level.FORWARD
    requires = frozenset({"canonicalize"})
    tier = Tier.REASSOCIATES

    def run(self, program: Program, context: PassContext) -> bool:
        counts: dict[str, int] = {}
        dropped: list[fx.Node] = []
        with decided(context.kernels):
            if mode_of_kernels() != "off":
                builder = Builder(program, context, self.name)
                for fusion, sites in _found(program):
                    writer = Writer(builder, *sites)
                    if _replace(writer, fusion, sites):
                        counts[fusion.name] = counts.get(fusion.name, 0) + 1
                    dropped += writer.dropped
        for node in dropped:
            program.graph.erase_node(node)
        if counts:
            remove_dead(program)
        context.statistics.update(sorted(counts.items()))
        return bool(counts)


def _found(program: Program) -> Iterator[tuple[Fusion, tuple[Site, ...]]]:
    """Sites from the last to the first, none within another; each with the one it goes together with, if it needs one.

    What comes before a site may be replaced while the next is looked for.
    """
    nodes = program.compute_nodes()
    place = {node: index for index, node in enumerate(nodes)}
    varying = varying_of(program)
    taken: set[fx.Node] = set()
    alone: dict[Hashable, Site] = {}
    for node in reversed(nodes):
        match = None if node in taken else _first(node, place, varying)
        if match is None:
            continue
        fusion, site = match
        taken |= site.found.inner
        if fusion.together is None:
            yield fusion, (site,)
        elif (key := fusion.together(site)) in alone:
            yield fusion, (site, alone.pop(key))
        else:
            alone[key] = site


def _first(node: fx.Node, place: dict[fx.Node, int], varying: frozenset[fx.Node]) -> tuple[Fusion, Site] | None:
    """The first row of the table that fits what a call gives."""
    for fusion in FUSIONS:
        site = next(fusion.sites(node, place, varying), None)
        if site is not None:
            return fusion, site
    return None


def _replace(writer: Writer, fusion: Fusion, sites: tuple[Site, ...]) -> bool:
    builder = writer.builder
    variant, why = fusion.family.choose(sites[0].value(fusion.of))
    replaced = fusion.write(writer)
    for old, new in replaced.items():
        count = sum(len(site.found.inner) for site in sites)
        explain(new, builder.made_by, f"{fusion.name} for {count} operators, by {variant} ({why})")
        old.replace_all_uses_with(new)
    for node in sorted({each for site in sites for each in site.found.inner}, key=sites[0].place.__getitem__)[::-1]:
        if not node.users:
            builder.graph.erase_node(node)
    return bool(replaced)
