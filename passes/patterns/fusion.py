"""A row of the tables: a pattern, the conditions in which a kernel takes it, and what stands in its place."""

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.dimensions.notation import same_shape
from graphopt.ir import InputKind, Phase, Program, facts_of
from graphopt.passes.build import Builder
from graphopt.passes.patterns.pattern import Found, Pattern, uncast
from graphopt.triton_kernels.choice import Family, mode_of_kernels

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A place that a pattern fits: its last call, what was found, and the program around it.

    place: of each call, where it comes in the program. varying: nodes on which a gradient may depend.
    """

    root: fx.Node
    found: Found
    place: Mapping[fx.Node, int]
    varying: frozenset[fx.Node]

    def __getitem__(self, name: str) -> Any:
        return self.found[name]

    def value(self, name: str) -> torch.Tensor:
        """The fake tensor that a name stands for."""
        value: torch.Tensor = self[name].meta["val"]
        return value

    @property
    def result(self) -> torch.Tensor:
        value: torch.Tensor = self.root.meta["val"]
        return value

    def is_inside(self, node: fx.Node) -> bool:
        """Whether nothing else reads a node that the site reads."""
        return all(user in self.found.inner for user in node.users)


class Writer:
    """Inserts calls on behalf of a site, and of the other that goes together with it, if one does."""

    def __init__(self, builder: Builder, site: Site, other: Site | None = None) -> None:
        self.builder = builder
        self.site, self.other = site, other
        self.dropped: list[fx.Node] = []

    def before(self, anchor: fx.Node) -> Any:
        return self.builder.before(anchor)

    def drop(self, *nodes: fx.Node) -> None:
        """Have calls erased that nothing reads when all sites are replaced, the last first; random ones too."""
        self.dropped += nodes

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.builder.call(target, *args, like=self.site.root, phase=Phase.FORWARD, **kwargs)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self.call(aten._to_copy.default, node, dtype=dtype)

    def like(self, node: fx.Node, viewed: fx.Node) -> fx.Node:
        """A node in the shape of another, which may be a view of one in its shape, and cast."""
        if same_shape(node.meta["val"].shape, viewed.meta["val"].shape):
            return node
        return self.call(aten.reshape.default, node, uncast(viewed).args[1])


Replacements = Mapping[fx.Node, fx.Node]


@dataclass(frozen=True)
class Fusion:
    """name: of the kernel's operator. pattern: of the call that comes last.

    fits: whether the kernel computes what the site does. of: the name of the tensor by which a variant is chosen.
    write: inserts calls; which of them stand for which of the program's.
    together: what two sites have in common that one kernel takes; None if it takes one.
    """

    name: str
    family: Family
    pattern: Pattern
    of: str
    fits: Callable[[Site], bool]
    write: Callable[[Writer], Replacements]
    together: Callable[[Site], Hashable] | None = None

    def sites(self, node: fx.Node, place: Mapping[fx.Node, int], varying: frozenset[fx.Node]) -> Iterator[Site]:
        """The ways in which the pattern fits what a call gives."""
        for found in self.pattern(node, Found()):
            site = Site(node, found, place, varying)
            if _is_closed(site) and self.fits(site) and self._has_kernel(site):
                yield site

    def _has_kernel(self, site: Site) -> bool:
        """Whether a variant is there for the site's tensors, or was asked for."""
        return mode_of_kernels() != "auto" or self.family.choose(site.value(self.of)).variant != "reference"


def varying_of(program: Program) -> frozenset[fx.Node]:
    """The nodes on which a gradient may depend: what is computed from parameters, or from inputs that have one."""
    asked = {node for role, node in program.nodes_of(*InputKind) if role.requires_grad}
    for node in program.compute_nodes():
        if any(each in asked for each in node.all_input_nodes):
            asked.add(node)
    return frozenset(asked)


def _is_closed(site: Site) -> bool:
    """Whether nothing but the site reads its inner values, all of one layer and one checkpointed region."""
    inner = site.found.inner
    wheres = {(facts_of(node).layer, facts_of(node).checkpoint) for node in inner}
    return len(wheres) == 1 and all(node is site.root or site.is_inside(node) for node in inner)
