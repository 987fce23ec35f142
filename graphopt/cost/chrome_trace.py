"""A schedule in the Trace Event Format (JSON object), which Perfetto and chrome://tracing open."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from graphopt.cost.operations import work_of
from graphopt.cost.simulator import COMPUTE, Schedule, Task
from graphopt.ir import facts_of
from graphopt.ir.collectives import collective_of
from graphopt.ir.values import described


def chrome_trace(schedule: Schedule, ranks: Iterable[int] = (0,)) -> dict[str, Any]:
    """The trace of `ranks`, each a process whose threads are the streams; all have the same schedule.

    Give `json.dump` what this returns. Times are in microseconds, to the nanosecond.
    """
    events = [event for rank in ranks for event in (*_names(schedule, rank), *_events(schedule, rank))]
    summary = {
        "hardware": schedule.hardware.name,
        "total_seconds": schedule.total_seconds,
        "compute_seconds": schedule.compute_seconds,
        "exposed_seconds": schedule.exposed_seconds,
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": summary}


def _names(schedule: Schedule, rank: int) -> Iterator[dict[str, Any]]:
    """Metadata events: what the process and its threads are called, and in which order they stand."""
    yield _metadata("process_name", rank, 0, name=f"rank {rank}")
    yield _metadata("process_sort_index", rank, 0, sort_index=rank)
    for thread, stream in enumerate(schedule.streams):
        name = stream if stream == COMPUTE else f"collectives over {stream}"
        yield _metadata("thread_name", rank, thread, name=name)
        yield _metadata("thread_sort_index", rank, thread, sort_index=thread)


def _metadata(what: str, rank: int, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": args}


def _events(schedule: Schedule, rank: int) -> Iterator[dict[str, Any]]:
    """Complete events: each with a start and a duration. Those of a thread do not overlap."""
    thread = {stream: index for index, stream in enumerate(schedule.streams)}
    for task in schedule.tasks:
        yield _event(task, _title(task.node), facts_of(task.node).phase.value, rank, thread[task.stream])
    for stall in schedule.stalls:
        yield _event(stall, "wait", "stall", rank, thread[stall.stream])


def _event(task: Task, title: str, category: str, rank: int, thread: int) -> dict[str, Any]:
    start, end = _nanoseconds(task.start), _nanoseconds(task.end)
    return {
        "ph": "X",
        "name": title,
        "cat": category,
        "pid": rank,
        "tid": thread,
        "ts": start / 1000,
        "dur": (end - start) / 1000,
        "args": _arguments(task),
    }


def _nanoseconds(seconds: float) -> int:
    """Viewers count whole nanoseconds, and drop an event that starts one before the last has ended."""
    return round(seconds * 1e9)


def _title(node: fx.Node) -> str:
    collective = collective_of(node)
    return str(node.target) if collective is None else collective.kind


def _arguments(task: Task) -> dict[str, Any]:
    """What a reader who selects the event is told."""
    node = task.node
    facts, work, collective = facts_of(node), work_of(node), collective_of(node)
    told = {
        "node": node.name,
        "value": described(node.meta["val"]),
        "phase": facts.phase.value,
        "module": facts.module,
        "source": facts.source,
        "made_by": facts.made_by,
        "reasons": "; ".join(facts.reasons),
        "flops": work.flops,
        "read_bytes": work.read_bytes,
        "written_bytes": work.written_bytes,
        "whole_bytes": 0 if collective is None else collective.whole_bytes,
    }
    return {name: value for name, value in told.items() if value}
