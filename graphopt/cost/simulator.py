"""When each call of a program runs on a rank: one compute stream, one for each mesh axis, one for each way of copies.

The host issues calls in program order and runs ahead of the device. A collective starts when all that was issued to
compute before it is done, and the collectives before it on its axis are (as process groups order them); a wait holds
up what is issued to compute behind it until its collective is done. Copies elsewhere and back do likewise. Ranks run
the same program on shards of the same size, so every rank of the mesh has this schedule, and none waits for a slower
one.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphopt.cost.duration import collective_seconds, compute_seconds, copy_seconds
from graphopt.cost.hardware import Hardware
from graphopt.cost.operations import work_of
from graphopt.ir import Program, facts_of
from graphopt.ir.collectives import WAIT, collective_of
from graphopt.ir.copies import COPY_LAUNCHES, COPY_WAITS, copy_of

COMPUTE = "compute"


@dataclass(frozen=True, slots=True)
class Task:
    """A node on a stream, from `start` to `end` in seconds."""

    node: fx.Node
    stream: str
    start: float
    end: float

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Schedule:
    """A step of one rank, which is that of every rank.

    streams: ``compute``, the mesh axes over which there are collectives, and the ways of copies (``to host``).
    tasks: what takes time, in program order; those of a stream follow each other.
    stalls: waits that hold up the compute stream, and for how long.
    critical_path: tasks of which each starts as the one before it ends, from the first second to the last.
    total_seconds: until all is computed and, as every collective is waited for, has travelled.
    """

    hardware: Hardware
    streams: tuple[str, ...]
    tasks: tuple[Task, ...] = field(repr=False)
    stalls: tuple[Task, ...] = field(repr=False)
    critical_path: tuple[Task, ...] = field(repr=False)
    total_seconds: float

    @property
    def compute_seconds(self) -> float:
        """How long the compute stream is at work."""
        return self.busy_seconds(COMPUTE)

    @property
    def exposed_seconds(self) -> float:
        """How long the compute stream waits for collectives and copies."""
        return sum(stall.duration for stall in self.stalls)

    def busy_seconds(self, stream: str) -> float:
        """How long a stream is at work."""
        return sum(task.duration for task in self.tasks if task.stream == stream)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; times in seconds."""
        return {
            "hardware": self.hardware.name,
            "total_seconds": self.total_seconds,
            "compute_seconds": self.compute_seconds,
            "exposed_seconds": self.exposed_seconds,
            "streams": {stream: self.busy_seconds(stream) for stream in self.streams},
            "tasks": [_row(task) for task in self.tasks],
            "stalls": [_row(task) for task in self.stalls],
            "critical_path": [task.node.name for task in self.critical_path],
        }


def simulate(program: Program, mesh: Mapping[str, int], hardware: Hardware) -> Schedule:
    """The schedule of a program over a mesh (axis name -> ranks), in time linear in its nodes."""
    simulation = _Simulation(mesh, hardware)
    for node in program.graph.nodes:
        if node.op == "call_function":
            simulation.issue(node)
    return simulation.schedule()


class _Simulation:
    """The state of the streams while calls are issued.

    Of each stream the moment from which it is free, and the task that ends then.
    """

    def __init__(self, mesh: Mapping[str, int], hardware: Hardware) -> None:
        self._mesh = mesh
        self._hardware = hardware
        self._free: dict[str, tuple[float, int | None]] = {COMPUTE: (0.0, None)}
        self._launched: dict[fx.Node, int] = {}
        self._tasks: list[Task] = []
        self._before: list[int | None] = []  # of each task the one whose end it starts at
        self._stalls: list[Task] = []

    def issue(self, node: fx.Node) -> None:
        if node.target is WAIT or node.target in COPY_WAITS:
            self._wait(node)
            return
        if node.target in COPY_LAUNCHES:
            copy = copy_of(node)
            self._launched[node] = self._run(node, copy.link, copy_seconds(node, copy.place, self._hardware))
            return
        collective = collective_of(node)
        if collective is not None:
            link = self._hardware.link_of(collective.axis)
            seconds = collective_seconds(collective, self._mesh[collective.axis], link)
            self._launched[node] = self._run(node, collective.axis, seconds)
            return
        seconds = compute_seconds(work_of(node), self._hardware)
        if seconds:
            self._run(node, COMPUTE, seconds)

    def _run(self, node: fx.Node, stream: str, seconds: float) -> int:
        """Put a task on a stream behind what is there, and behind what was issued to compute."""
        start, before = self._free[COMPUTE]
        if stream in self._free and self._free[stream][0] > start:
            start, before = self._free[stream]
        task = Task(node, stream, start, start + seconds)
        self._tasks.append(task)
        self._before.append(before)
        self._free[stream] = (task.end, len(self._tasks) - 1)
        return len(self._tasks) - 1

    def _wait(self, node: fx.Node) -> None:
        launched = node.args[0]
        if isinstance(launched, fx.Node) and launched.target is operator.getitem:
            launched = launched.args[0]
        assert isinstance(launched, fx.Node)
        awaited = self._launched[launched]
        end, (now, _) = self._tasks[awaited].end, self._free[COMPUTE]
        if end > now:
            self._stalls.append(Task(node, COMPUTE, now, end))
            self._free[COMPUTE] = (end, awaited)

    def schedule(self) -> Schedule:
        total, last = self._free[COMPUTE]
        path = []
        while last is not None:
            path.append(self._tasks[last])
            last = self._before[last]
        return Schedule(
            hardware=self._hardware,
            streams=tuple(self._free),
            tasks=tuple(self._tasks),
            stalls=tuple(self._stalls),
            critical_path=tuple(reversed(path)),
            total_seconds=total,
        )


def _row(task: Task) -> dict[str, Any]:
    facts = facts_of(task.node)
    return {
        "node": task.node.name,
        "stream": task.stream,
        "start": task.start,
        "duration": task.duration,
        "phase": facts.phase.value,
        "module": facts.module,
    }
