"""Schedules: by hand, what is true of every one, and what prefetching does."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cost.hardware import Hardware, Link, find_hardware
from graphopt.cost.simulator import COMPUTE, Schedule, simulate
from graphopt.ir import Program
from graphopt.ir.collectives import collectives_of
from tests.ir.built import Hand, functional
from tests.support.programs import lowered

aten = torch.ops.aten
GATHER = functional.all_gather_into_tensor_coalesced.default
MESH = {"dp": 2, "tp": 4}


def hardware(bandwidth: float, latency: float = 0.0, launch: float = 0.0, memory: float = 1.0) -> Hardware:
    """Memory of 1 byte/s by default, and arithmetic that takes no time."""
    return Hardware("simple", {"float32": math.inf}, memory, 1 << 20, launch, Link(bandwidth, latency))


def spans(schedule: Schedule) -> list[tuple[str, str, float, float]]:
    return [(task.node.name, task.stream, task.start, task.end) for task in schedule.tasks]


def test_a_gather_travels_while_what_was_issued_behind_it_computes() -> None:
    """Calls of 8 s, and two gathers of 16 s: behind the first call, waited for after the third; behind the second."""
    hand = Hand()
    x, shard = hand.input(1), hand.input(2)
    first = hand.call(aten.neg.default, x)
    one = hand.call(GATHER, [shard], 2, "dp")
    second = hand.call(aten.neg.default, first)
    two = hand.call(GATHER, [shard], 2, "dp")
    third = hand.call(aten.neg.default, second)
    ready = hand.waited(one, 0)
    fourth = hand.call(aten.neg.default, third)
    late = hand.waited(two, 0)
    fifth = hand.call(aten.neg.default, fourth)
    found = simulate(hand.program(fifth, ready, late), MESH, hardware(bandwidth=0.5))
    assert spans(found) == [
        (first.name, COMPUTE, 0, 8),
        (one.name, "dp", 8, 24),
        (second.name, COMPUTE, 8, 16),
        (two.name, "dp", 24, 40),
        (third.name, COMPUTE, 16, 24),
        (fourth.name, COMPUTE, 24, 32),
        (fifth.name, COMPUTE, 40, 48),
    ]
    assert [(stall.node, stall.start, stall.end) for stall in found.stalls] == [(late, 32, 40)]
    assert (found.total_seconds, found.compute_seconds, found.exposed_seconds) == (48, 40, 8)
    assert [task.node for task in found.critical_path] == [first, one, two, fifth]
    assert found.streams == (COMPUTE, "dp") and found.busy_seconds("dp") == 32


def test_axes_do_not_wait_for_each_other() -> None:
    hand = Hand()
    shard = hand.input(2)
    launched = [hand.call(GATHER, [shard], MESH[axis], axis) for axis in MESH]
    waited = [hand.waited(node, 0) for node in launched]
    links = {"dp": Link(8.0, 0), "tp": Link(24.0, 1.0)}
    mixed = Hardware("mixed", {"float32": 1.0}, 1.0, 1, 0, Link(1, 0), links)
    found = simulate(hand.program(*waited), MESH, mixed)
    assert [(task.stream, task.start, task.end) for task in found.tasks] == [("dp", 0, 1), ("tp", 0, 4)]
    assert found.total_seconds == found.exposed_seconds == 4


def test_a_schedule_as_plain_values() -> None:
    _, program = lowered("zero=3,zero.whole_below=0")
    found = simulate(program, {"dp": 2}, find_hardware("h100-sxm"))
    values = found.to_dict()
    assert values["hardware"] == "h100-sxm"
    assert values["streams"] == {stream: found.busy_seconds(stream) for stream in (COMPUTE, "dp")}
    assert len(values["tasks"]) == len(found.tasks) and len(values["stalls"]) == len(found.stalls)
    assert values["critical_path"] == [task.node.name for task in found.critical_path]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.integers(1, 9), st.integers(0, 9)),
        st.tuples(st.sampled_from(list(MESH)), st.integers(1, 9), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.just(0), st.integers(0, 9)),
    ),
    max_size=25,
)
machines = st.builds(
    hardware,
    bandwidth=st.floats(0.1, 1000),
    latency=st.floats(0, 10),
    launch=st.floats(0, 10),
    memory=st.floats(0.1, 1000),
)


def drawn(steps: list[tuple[str, int, int]]) -> Program:
    """A program of calls and gathers that read earlier values; every gather is waited for, somewhere behind it."""
    hand = Hand()
    values = [hand.input(3)]
    flying: list[Any] = []
    for kind, size, index in steps:
        source = values[index % len(values)]
        if kind == "compute":
            values.append(hand.call(aten.repeat.default, hand.call(aten.neg.default, source), [size]))
        elif kind != "wait":
            flying.append(hand.call(GATHER, [source], MESH[kind], kind))
        elif flying:
            values.append(hand.waited(flying.pop(index % len(flying)), 0))
    values += [hand.waited(launched, 0) for launched in flying]
    return hand.program(*values)


def ends_of_values(program: Program, found: Schedule) -> dict[Any, float]:
    """When each value is there: at the end of its task; without one, when that from which it is taken is."""
    ends = {task.node: task.end for task in found.tasks}
    for node in program.graph.nodes:
        ends.setdefault(node, max((ends[source] for source in node.all_input_nodes), default=0.0))
    return ends


@given(steps=steps, machine=machines)
def test_what_is_true_of_every_schedule(steps, machine: Hardware) -> None:
    program = drawn(steps)
    found = simulate(program, MESH, machine)
    busy = {stream: found.busy_seconds(stream) for stream in found.streams}
    assert max(busy.values()) <= found.total_seconds * (1 + 1e-9)
    assert found.total_seconds <= sum(busy.values()) * (1 + 1e-9)
    assert found.total_seconds == pytest.approx(found.compute_seconds + found.exposed_seconds)

    ends = ends_of_values(program, found)
    on_stream = defaultdict(list)
    for task in found.tasks:
        on_stream[task.stream].append(task)
        assert task.start >= max((ends[source] for source in task.node.all_input_nodes), default=0.0)
        assert task.end <= found.total_seconds
    for tasks in (*on_stream.values(), sorted([*on_stream[COMPUTE], *found.stalls], key=lambda task: task.start)):
        assert all(one.end <= other.start for one, other in itertools.pairwise(tasks))

    path = found.critical_path
    assert all(one.end == other.start for one, other in itertools.pairwise(path))
    assert not path or (path[0].start, path[-1].end) == (0, found.total_seconds)


@given(steps=steps, machine=machines)
def test_ideal_links_expose_nothing(steps, machine: Hardware) -> None:
    ideal = hardware(math.inf, launch=machine.launch_seconds, memory=machine.memory_bandwidth)
    found = simulate(drawn(steps), MESH, ideal)
    assert found.exposed_seconds == 0 and found.stalls == ()
    assert found.total_seconds == pytest.approx(found.compute_seconds)


@pytest.fixture(scope="module")
def prefetching() -> Mapping[int, Program]:
    """A Llama of equal layers, by how many buckets it gathers ahead."""
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    ids = torch.randint(0, 128, (4, 32))
    plan = "zero=3,zero.whole_below=0,zero.bucket_bytes=65536,zero.prefetch={}"
    return {ahead: lowered(plan.format(ahead), 4, model, input_ids=ids, labels=ids)[1] for ahead in (0, 1, 2)}


@given(bandwidth=st.floats(1e3, 1e15), latency=st.floats(0, 1e-2))
def test_prefetching_never_exposes_more(prefetching: Mapping[int, Program], bandwidth: float, latency: float) -> None:
    """Without it everything is exposed; one bucket ahead hides some, two at least as much."""
    machine = Hardware.from_dict({"base": "h100-sxm", "link": {"bandwidth": bandwidth, "latency": latency}})
    found = {ahead: simulate(program, {"dp": 4}, machine) for ahead, program in prefetching.items()}
    assert found[0].exposed_seconds == pytest.approx(found[0].busy_seconds("dp"))
    assert found[1].exposed_seconds < found[0].exposed_seconds
    assert found[2].exposed_seconds <= found[1].exposed_seconds * (1 + 1e-9)
    assert found[1].compute_seconds == pytest.approx(found[0].compute_seconds)


def test_one_bucket_ahead_hides_all_but_the_first_and_last_where_layers_outlast_their_transfers(
    prefetching: Mapping[int, Program],
) -> None:
    fast = Hardware.from_dict({"base": "h100-sxm", "link": {"bandwidth": 1e15, "latency": 1e-6}})
    found = simulate(prefetching[1], {"dp": 4}, fast)
    collectives = collectives_of(prefetching[1])
    assert len(collectives) > 12 and len(found.stalls) <= 4
