"""A schedule in the Trace Event Format (JSON object), which Perfetto and chrome://tracing open."""

from collections.abc import Iterable, Iterator
from typing import Any

from graphopt.cost.operations import work_of
from graphopt.cost.simulator import COMPUTE, Schedule, Task
from graphopt.ir import facts_of
from graphopt.ir.collectives import collective_of
from graphopt.ir.values import described

_MICROSECONDS = 1e6


def chrome_trace(schedule: Schedule, ranks: Iterable[int] = (0,)) -> dict[str, Any]:
    """The trace of `ranks`, each a process whose threads are the streams; all have the same schedule.

    Give `json.dump` what this returns. Times are in microseconds.
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
    thread = {stream: index for index, stream in enumerate(schedule.streams)}
    for task in schedule.tasks:
        yield _event(task, facts_of(task.node).phase.value, rank, thread[task.stream])
    for stall in schedule.stalls:
        yield _event(stall, "stall", rank, thread[stall.stream])


def _event(task: Task, category: str, rank: int, thread: int) -> dict[str, Any]:
    """A complete event: one with a start and a duration."""
    return {
        "ph": "X",
        "name": str(task.node.target) if category != "stall" else f"waits for {task.node.args[0]}",
        "cat": category,
        "pid": rank,
        "tid": thread,
        "ts": task.start * _MICROSECONDS,
        "dur": task.duration * _MICROSECONDS,
        "args": _arguments(task),
    }


def _arguments(task: Task) -> dict[str, Any]:
    """What a reader who selects the event is told."""
    node = task.node
    facts = facts_of(node)
    told = {
        "node": node.name,
        "value": described(node.meta["val"]),
        "phase": facts.phase.value,
        "module": facts.module,
        "source": facts.source,
        "made_by": facts.made_by,
        "reasons": "; ".join(facts.reasons),
    }
    collective = collective_of(node)
    if collective is not None:
        told["whole_bytes"] = collective.whole_bytes
    elif task.stream == COMPUTE:
        work = work_of(node)
        told.update(flops=work.flops, read_bytes=work.read_bytes, written_bytes=work.written_bytes)
    return {name: value for name, value in told.items() if value}
