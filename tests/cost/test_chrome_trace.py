"""Traces keep to the format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU."""

import itertools
import json
from collections import defaultdict
from typing import Any

import pytest

from graphopt.cost.chrome_trace import chrome_trace
from graphopt.cost.hardware import find_hardware
from graphopt.cost.simulator import Schedule, simulate
from tests.support.programs import lowered

RANKS = (0, 3)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    _, program = lowered("zero=3,zero.whole_below=0,zero.bucket_bytes=1024", 4)
    return simulate(program, {"dp": 4}, find_hardware("a100-80gb-sxm"))


@pytest.fixture(scope="module")
def trace(schedule: Schedule) -> dict[str, Any]:
    return json.loads(json.dumps(chrome_trace(schedule, RANKS), allow_nan=False))


def events(trace: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def test_every_event_has_the_keys_that_the_format_requires(trace: dict[str, Any]) -> None:
    assert {event["ph"] for event in trace["traceEvents"]} == {"X", "M"}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
    for event in events(trace, "X"):
        assert event["ts"] >= 0 and event["dur"] >= 0
    assert trace["displayTimeUnit"] in ("ms", "ns")


def test_processes_are_ranks_and_threads_are_streams(trace: dict[str, Any]) -> None:
    named = {(e["name"], e["pid"], e["tid"]): e["args"] for e in events(trace, "M")}
    for rank in RANKS:
        assert named["process_name", rank, 0] == {"name": f"rank {rank}"}
        assert named["thread_name", rank, 0] == {"name": "compute"}
        assert named["thread_name", rank, 1] == {"name": "collectives over dp"}
    threads = {(pid, tid) for what, pid, tid in named if what == "thread_name"}
    assert threads == {(event["pid"], event["tid"]) for event in events(trace, "X")}


def test_events_are_the_tasks_of_every_rank_in_microseconds(schedule: Schedule, trace: dict[str, Any]) -> None:
    for rank in RANKS:
        found = [e for e in events(trace, "X") if e["pid"] == rank and e["cat"] != "stall"]
        assert [e["args"]["node"] for e in found] == [task.node.name for task in schedule.tasks]
        for event, task in zip(found, schedule.tasks, strict=True):
            assert event["tid"] == schedule.streams.index(task.stream)
            assert event["ts"] == pytest.approx(task.start * 1e6, abs=1e-3)
            assert event["dur"] == pytest.approx(task.duration * 1e6, abs=1e-3)
        stalls = [e for e in events(trace, "X") if e["pid"] == rank and e["cat"] == "stall"]
        assert len(stalls) == len(schedule.stalls) > 0


def test_events_of_a_thread_do_not_overlap_in_whole_nanoseconds(trace: dict[str, Any]) -> None:
    """Perfetto rounds start and duration each by itself, and drops what overlaps."""
    threads = defaultdict(list)
    for event in events(trace, "X"):
        start = round(event["ts"] * 1000)
        threads[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000)))
    for spans in threads.values():
        spans.sort()
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


def test_an_event_tells_what_its_node_is(trace: dict[str, Any]) -> None:
    multiplication = next(e for e in events(trace, "X") if e["name"] == "aten.mm.default")
    assert multiplication["args"]["flops"] == 2 * 4 * 16 * 16
    assert multiplication["args"]["module"] == "layers.0.0" and multiplication["cat"] == "forward"
    gather = next(e for e in events(trace, "X") if e["name"] == "all-gather")
    assert gather["args"]["whole_bytes"] == 1024 and gather["args"]["made_by"] == "zero"
