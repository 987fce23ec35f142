"""interleave: while values travel over a model axis, compute what else is ready.

Calls are listed as a device would take them, the next always one whose arguments are there (list scheduling: Graham
1966); what travels is there when it has arrived by the cost model's times, or when there is nothing else to do. Every
rank makes the same list.
"""

import heapq
import itertools
from dataclasses import dataclass

from torch import fx

from graphopt.cost.duration import collective_seconds, compute_seconds
from graphopt.cost.operations import work_of
from graphopt.errors import PassError
from graphopt.ir import Effect, Level, OutputKind, Phase, Program, effect_of, explain
from graphopt.ir.collectives import WAIT, collective_of, launch_of, summand_of
from graphopt.passes.base import Pass, PassContext

_TRAVELS, _LEADS_SOON, _LEADS, _FILLS = range(4)  # classes of calls, the first goes first
_ANY_ORDER = frozenset({Effect.PURE, Effect.COLLECTIVE})


@dataclass(frozen=True)
class InterleaveOptions:
    """ahead: calls by which one may be early, or late if nothing waits for it: what it gives or reads takes memory."""

    ahead: int = 256

    def __post_init__(self) -> None:
        if self.ahead < 0:
            raise PassError(f"interleave: ahead={self.ahead} is negative; the nearest valid choice is 0")


class Interleave(Pass):
    """Launch collectives as soon as they can be, and wait for them when they have arrived or nothing else is ready."""

    name = "interleave"
    Options = InterleaveOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"interleave", "zero", "bucket", "schedule", "offload_state", "overlap"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        before = program.compute_nodes()
        last = _sums_of_gradients(program)
        after = [node for phase in Phase for node in _Listing(program, phase, context, self.options.ahead, last).run()]
        for node in after:
            program.output_node.prepend(node)
        later = [node for node in after if node.target is WAIT and node.prev is not _launched(node)]
        for wait in later:
            explain(wait, self.name, f"waited for before {wait.next.name}: until then there was something to compute")
        context.statistics.update(waits=sum(node.target is WAIT for node in after), waited_later=len(later))
        return after != before


def _sums_of_gradients(program: Program) -> set[fx.Node]:
    """The collectives whose results only leave the program."""
    gradients = (node for _, node in program.results_of(OutputKind.GRADIENT) if node is not None)
    return {launched for gradient in gradients for launched in summand_of(gradient)[1]}


def _launched(wait: fx.Node) -> fx.Node:
    launched = wait.args[0]
    assert isinstance(launched, fx.Node)
    return launched


class _Listing:
    """Calls of one phase, and which of them can be taken while time goes on.

    Of each call its place in the program, its class, and how many of its arguments are missing. ready: places by class,
    the least first. travelling: waits whose collectives have been launched, by when they are done.
    """

    def __init__(self, program: Program, phase: Phase, context: PassContext, ahead: int, last: set[fx.Node]) -> None:
        self._nodes = nodes = program.compute_nodes(phase)
        self._context = context
        self._ahead = ahead
        self._place = {node: place for place, node in enumerate(nodes)}
        self._readers = _readers(nodes, self._place)
        self._missing = [0] * len(nodes)
        for readers in self._readers:
            for reader in readers:
                self._missing[reader] += 1
        self._seconds = [self._duration(node) for node in nodes]
        self._class = self._classes(last)
        self._ready: list[list[int]] = [[] for _ in (_TRAVELS, _LEADS_SOON, _LEADS, _FILLS)]
        self._travelling: list[tuple[float, int]] = []
        self._now = 0.0
        self._link_free: dict[str, float] = {}
        self._done_at: dict[fx.Node, float] = {}

    def _duration(self, node: fx.Node) -> float:
        collective = collective_of(node)
        if collective is not None:
            link = self._context.hardware.link_of(collective.axis)
            return collective_seconds(collective, self._context.mesh[collective.axis], link)
        return 0.0 if node.target is WAIT else compute_seconds(work_of(node), self._context.hardware)

    def _classes(self, last: set[fx.Node]) -> list[int]:
        """Of each call: whether it is a launch, leads to one in less time than that will travel, later, or never.

        So links are kept at work (Johnson 1954: what is soon done with the first machine, and long on the second, goes
        first), and gradients of weights fill the time in which nothing else can be done.
        """
        found = [_FILLS] * len(self._nodes)
        lead: dict[int, tuple[float, float]] = {}  # the time to the nearest launch, and how long that travels
        for place in reversed(range(len(self._nodes))):
            node, seconds = self._nodes[place], self._seconds[place]
            if collective_of(node) is not None and node not in last:
                lead[place], found[place] = (0.0, seconds), _TRAVELS
                continue
            ahead = [lead[reader] for reader in self._readers[place] if reader in lead]
            if ahead:
                distance, travel = min(ahead)
                lead[place] = (distance + seconds, travel)
                found[place] = _LEADS_SOON if distance + seconds < travel else _LEADS
        return found

    def run(self) -> list[fx.Node]:
        """All calls in their new order."""
        for place, missing in enumerate(self._missing):
            if not missing:
                self._make_ready(place)
        order: list[fx.Node] = []
        taken = [False] * len(self._nodes)
        oldest = 0
        while len(order) < len(self._nodes):
            while oldest < len(taken) and (taken[oldest] or self._class[oldest] == _FILLS):
                oldest += 1
            place = self._next(oldest)
            taken[place] = True
            order.append(self._nodes[place])
            self._take(place)
            for reader in self._readers[place]:
                self._missing[reader] -= 1
                if not self._missing[reader]:
                    self._make_ready(reader)
        return order

    def _make_ready(self, place: int) -> None:
        node = self._nodes[place]
        if node.target is WAIT:
            heapq.heappush(self._travelling, (self._done_at[_launch(node)], place))
        else:
            heapq.heappush(self._ready[self._class[place]], place)

    def _next(self, oldest: int) -> int:
        """The call to take, when those before place `oldest` are taken, or only fill time."""
        while self._travelling and self._travelling[0][0] <= self._now:
            place = heapq.heappop(self._travelling)[1]
            heapq.heappush(self._ready[self._class[place]], place)
        filling = self._ready[_FILLS]
        if filling and filling[0] < oldest - self._ahead:
            return heapq.heappop(filling)
        for ready in self._ready:
            if ready and (ready[0] <= oldest + self._ahead or not self._travelling):
                return heapq.heappop(ready)
        self._now, place = heapq.heappop(self._travelling)
        return place

    def _take(self, place: int) -> None:
        """Let the time pass that a call takes on the device, or on its link."""
        node, seconds = self._nodes[place], self._seconds[place]
        collective = collective_of(node)
        if collective is None:
            self._now += seconds
        else:
            start = max(self._now, self._link_free.get(collective.axis, 0.0))
            self._link_free[collective.axis] = self._done_at[node] = start + seconds


def _launch(wait: fx.Node) -> fx.Node:
    launch = launch_of(_launched(wait))
    assert launch is not None
    return launch[0].node


def _readers(nodes: list[fx.Node], place: dict[fx.Node, int]) -> list[list[int]]:
    """The places of the calls that must stand behind each: what reads it, and of draws and copies the next one."""
    found = [[place[user] for user in node.users if user in place] for node in nodes]
    fixed = [index for index, node in enumerate(nodes) if effect_of(node) not in _ANY_ORDER]
    for one, behind in itertools.pairwise(fixed):
        if behind not in found[one]:
            found[one].append(behind)
    return found
