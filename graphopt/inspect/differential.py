"""Runs a compilation beside the uncompiled model, pass by pass, and finds the pass and the node where they part."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import fx, nn

from graphopt.errors import GraphoptError
from graphopt.inspect.exchanges import Values
from graphopt.inspect.outcome import Outcome, eager_outcome, inputs_of, program_outcome, whole_batch_outcome
from graphopt.inspect.simulate import Simulation
from graphopt.inspect.workload import Workload
from graphopt.ir import Level, OutputKind, ParameterLayout, Program, facts_of
from graphopt.ir.context import COMMUNICATING
from graphopt.ir.snapshot import copied
from graphopt.lowering import lower
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass, Tier
from graphopt.passes.pipeline import PassRecord
from graphopt.plan import Plan

_BOUND_IN_EPSILONS = 64


@dataclass(frozen=True)
class Comparison:
    """One pass (or the capture) against what came before it.

    worst: the largest difference of an output, relative to its largest element; role: of which. bound: what is allowed.
    """

    name: str
    tier: Tier
    worst: float
    bound: float
    role: str

    @property
    def agrees(self) -> bool:
        return self.worst <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite difference (of what is not there, or not finite) is None, which JSON can say."""
        worst = self.worst if math.isfinite(self.worst) else None
        return {**dataclasses.asdict(self), "tier": self.tier.value, "worst": worst}


@dataclass(frozen=True)
class Verdict:
    """All passes compared; the first that disagrees, and the first node whose value is another since then."""

    comparisons: list[Comparison]
    node: str | None = None

    @property
    def guilty(self) -> Comparison | None:
        return next((each for each in self.comparisons if not each.agrees), None)

    def to_dict(self) -> dict[str, Any]:
        passes = [each.to_dict() for each in self.comparisons]
        return {"passes": passes, "guilty": self.guilty.name if self.guilty else None, "node": self.node}


def verdict_table(verdict: Verdict) -> Table:
    """For a terminal: each pass with the worst difference it made, and what is allowed."""
    table = Table("pass", "tier", "worst difference", "allowed", "of", "")
    for each in verdict.comparisons:
        end = "agrees" if each.agrees else f"differs, first at {verdict.node}" if verdict.node else "differs"
        table.add_row(each.name, each.tier.value, f"{each.worst:.1e}", f"{each.bound:.1e}", each.role, end)
    return table


@dataclass(frozen=True)
class _Snapshot:
    """What a pass left: the program, and how it takes parameters to lie over the ranks."""

    record: PassRecord
    program: Program
    layouts: Mapping[str, ParameterLayout]

    @property
    def joins_ranks(self) -> bool:
        """Whether autograd would go through several ranks at once, and so sum in an order of its own."""
        return self.program.level is Level.FORWARD and any(
            n.target in COMMUNICATING for n in self.program.compute_nodes()
        )

    def of(self, workload: Workload) -> Workload:
        """The workload with parameters as this program takes them."""
        return dataclasses.replace(workload, layouts=self.layouts)

    def run(self, workload: Workload) -> Iterator[tuple[fx.Node, Values]]:
        """Every call with its value on each rank."""
        inputs = inputs_of(self.program, self.of(workload))
        with torch.no_grad():
            yield from Simulation(self.program, workload.mesh, workload.data_axis).run(inputs)


@dataclass
class _Snapshots:
    """An observer that keeps what each pass left, starting over when a compilation does; that fills in `layouts`."""

    taken: list[_Snapshot] = field(default_factory=list)
    layouts: dict[str, ParameterLayout] = field(default_factory=dict)

    def observe(self, record: PassRecord, program: Program) -> None:
        if record.name == "capture":
            self.taken.clear()
        self.taken.append(_Snapshot(record, copied(program), dict(self.layouts)))


def check(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: Plan,
    registry: Mapping[str, type[Pass]] = REGISTRY,
    *,
    verify: bool = False,
) -> Verdict:
    """Compare the model, its capture and the program after each pass of a resolved plan, one with the next.

    All ranks of the mesh run in this process, each replica with a batch of its own (the example's elements, rotated)
    and the same random numbers as in eager. A bitwise pass may change no bit; one that reassociates, and what is
    compared with the model itself (the capture and the first pass) or with autograd through all ranks of a split
    program, at most 64 epsilons of the dtype in which parameters compute, relative to the largest element. The model is
    not changed.
    verify: whether the verifier checks each pass as well, and stops at what it refuses with a VerificationError.
    Raises GraphoptError if the model's parameters have no values, and for a plan that cuts the model into stages.
    """
    if plan.pipeline_ranks > 1:
        raise GraphoptError("what is checked is a whole model, and stages are parts of one; leave pp out of the plan")
    if any(tensor.device.type == "meta" for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise GraphoptError(
            "the model is on the meta device, so there is nothing to compare; build it with its weights"
        )
    snapshots = _Snapshots()
    compilation = lower(
        model,
        args,
        kwargs,
        dataclasses.replace(plan, verify=verify),
        layouts=snapshots.layouts,
        observer=snapshots.observe,
        registry=registry,
    )
    with torch.random.fork_rng(devices=[]):
        return _compare_all(snapshots.taken, Workload.of(model, args, kwargs, plan, compilation), registry)


def _compare_all(taken: list[_Snapshot], workload: Workload, registry: Mapping[str, type[Pass]]) -> Verdict:
    """Each program with the one before, the first with the model, up to the first that differs."""
    known, by_autograd = eager_outcome(workload), True
    comparisons: list[Comparison] = []
    for index, snapshot in enumerate(taken):
        name, changed = snapshot.record.name, snapshot.record.changed
        # What is just captured may not be differentiable yet: canonicalize sees to that.
        is_capture = name not in registry
        found = outcome = program_outcome(snapshot.program, snapshot.of(workload), gradients=not is_capture)
        tier = Tier.REASSOCIATES if by_autograd else registry[name].tier if changed else Tier.BITWISE
        expected = {role: values for role, values in known.items() if not is_capture or role in found}
        if not is_capture and registry[name].tier is Tier.WHOLE_BATCH and changed:
            tier, expected, found = Tier.WHOLE_BATCH, whole_batch_outcome(workload), _means_of_scalars(found)
        comparisons.append(_compared(name, tier, expected, found, workload.epsilon))
        if not is_capture:
            known, by_autograd = outcome, snapshot.joins_ranks
        if not comparisons[-1].agrees:
            node = _first_node(taken[index - 1], snapshot, comparisons[-1], workload) if index else None
            return Verdict(comparisons, node)
    return Verdict(comparisons)


def _means_of_scalars(found: Outcome) -> Outcome:
    """Of outputs, the means of scalars over the ranks: what a run on the whole batch gives."""
    scalars = {role: values for role, values in found.items() if role.startswith("user") and values[0].dim() == 0}
    others = {role: values for role, values in found.items() if not role.startswith("user")}
    return others | {role: [torch.stack(values).mean()] for role, values in scalars.items()}


def _compared(name: str, tier: Tier, before: Outcome, after: Outcome, epsilon: float) -> Comparison:
    """The worst of all outputs that both have."""
    worst, role = 0.0, ""
    for key in sorted(before.keys() | after.keys()):
        if key not in before or key not in after:
            apart = float("inf")
        else:
            apart = max(_apart(a, b) for a, b in zip(before[key], after[key], strict=True))
        if apart > worst:
            worst, role = apart, key
    return Comparison(name, tier, worst, 0.0 if tier is Tier.BITWISE else _BOUND_IN_EPSILONS * epsilon, role)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest element; infinite if only one is finite there, or shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    if one.numel() == 0 or torch.equal(one, other):
        return 0.0
    a, b = one.double(), other.double()
    both_nan = a.isnan() & b.isnan()
    apart = torch.where(both_nan | (a == b), torch.zeros(()).double(), (a - b).abs())
    scale = a.nan_to_num(0.0, 0.0, 0.0).abs().max()
    worst = float(apart.max() / scale) if scale > 0 else float(apart.max())
    return worst if worst == worst else float("inf")


def _first_node(before: _Snapshot, after: _Snapshot, comparison: Comparison, workload: Workload) -> str | None:
    """The first node of the program after the guilty pass whose value is another than its counterpart's before."""
    counterpart = _counterparts(before.program, after.program)
    known = {node.name: value for node, value in before.run(workload)}
    for node, value in after.run(workload):
        one = known.get(counterpart(node), value)
        if _differ(one, value, comparison.bound) and not _came_apart(workload, one, value, comparison.bound):
            facts = facts_of(node)
            place = " ".join(filter(None, (facts.module, facts.source)))
            return f"{node.name} ({place})" if place else node.name
    return None


def _came_apart(workload: Workload, before: Values, after: Values, bound: float) -> bool:
    """Whether the ranks of a replica, alike before, are no longer: each has a summand."""
    return _alike(workload, before, bound) and not _alike(workload, after, bound)


def _alike(workload: Workload, values: Values, bound: float) -> bool:
    one_of = {place[workload.data_axis]: value for place, value in zip(workload.places, values, strict=True)}
    return not _differ(workload.on_ranks([one_of[replica] for replica in range(workload.replicas)]), values, bound)


def _counterparts(before: Program, after: Program) -> Callable[[fx.Node], str]:
    """The name, in the program before, of a node after.

    Of what is returned, what was; else the same name, or where levels differ that of what it was recorded from.
    """
    pairs = zip(after.results_of(OutputKind.USER), before.results_of(OutputKind.USER), strict=True)
    returned = {node: was.name for (_, node), (_, was) in pairs if node is not None and was is not None}
    if before.level is after.level:
        return lambda node: returned.get(node, node.name)
    last = {facts_of(node).origin: node for node in after.compute_nodes() if facts_of(node).origin is not None}
    recorded = {node: str(origin) for origin, node in last.items()}
    return lambda node: returned.get(node, recorded.get(node, ""))


def _differ(one: list[Any], other: list[Any], bound: float) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, torch.Tensor)]
    return any(a.shape == b.shape and _apart(a, b) > bound for a, b in pairs)
