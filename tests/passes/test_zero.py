"""What zero, bucket and schedule leave in a step program."""

import itertools

import pytest
from torch import fx

from graphopt.ir import InputKind, OutputKind, Phase, facts_of
from graphopt.ir.collectives import collectives_of
from graphopt.passes.bucket import GATHER
from tests.support.programs import lowered

SMALL = "zero.whole_below=0,zero.bucket_bytes=1024"


@pytest.mark.parametrize(("stage", "gathers"), [(1, 3), (2, 3), (3, 6)])
def test_each_parameter_is_gathered_where_the_stage_says(stage: int, gathers: int) -> None:
    _, program = lowered(f"zero={stage},{SMALL}")
    found = [c.kind for c in collectives_of(program)]
    assert found.count("all-gather") == gathers and found.count("reduce-scatter") == 3
    kinds = {role.kind for role in program.inputs}
    assert InputKind.SHARD in kinds and InputKind.PARAMETER not in kinds


def test_stage_three_saves_no_parameter_for_backward() -> None:
    compilation, _ = lowered(f"zero=3,{SMALL}")
    saved = [node for role, node in compilation.halves.forward.results_of(OutputKind.SAVED) if node is not None]
    assert saved and all(tuple(node.meta["val"].shape) == (4, 16) for node in saved)


def test_what_is_kept_is_gathered_once() -> None:
    _, program = lowered("zero=3,zero.whole_below=0,zero.keep_gathered=[layers.0.*]")
    gathered = sum(len(c.node.args[0]) for c in collectives_of(program) if c.kind == "all-gather")  # type: ignore[arg-type]
    assert gathered == 5


def test_stage_one_reduces_when_backward_is_done() -> None:
    _, program = lowered(f"zero=1,{SMALL},zero.prefetch=0")
    backward = program.compute_nodes(Phase.BACKWARD)
    first = next(i for i, node in enumerate(backward) if "reduce_scatter" in str(node.target))
    assert not any("mm" in str(node.target) for node in backward[first:])


@pytest.mark.parametrize(("size", "buckets"), [(1024, 3), (2048, 3), (4096, 2), (8192, 1)])
def test_buckets_hold_what_fits(size: int, buckets: int) -> None:
    """A bucket that is half full ends with its layer."""
    _, program = lowered(f"zero=2,zero.whole_below=0,zero.bucket_bytes={size}")
    found = [c.kind for c in collectives_of(program)]
    assert found.count("all-gather") == found.count("reduce-scatter") == buckets
    assert all(c.whole_bytes <= size for c in collectives_of(program))


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_gathers_run_ahead_by_the_buckets_the_plan_says(prefetch: int) -> None:
    _, program = lowered(f"zero=3,{SMALL},zero.prefetch={prefetch}")
    forward = program.compute_nodes(Phase.FORWARD)
    events = [_event(node) for node in forward if _event(node)]
    running = itertools.accumulate(1 if event == "launch" else -1 for event in events)
    assert max(running) == prefetch + 1
    assert [facts_of(n).phase for n in forward] == [Phase.FORWARD] * len(forward)


def _event(node: fx.Node) -> str:
    return "launch" if node.target is GATHER else "wait" if "wait_tensor" in str(node.target) else ""


def test_precision_casts_before_the_gather() -> None:
    _, program = lowered("zero=3,zero.whole_below=0,precision=bf16")
    half = [c.whole_bytes for c in collectives_of(program) if c.kind == "all-gather"]
    full = [c.whole_bytes for c in collectives_of(program) if c.kind == "reduce-scatter"]
    assert sum(half) == 2 * 3 * 512 and sum(full) == 3 * 1024
    assert {str(node.meta["val"].dtype) for _, node in program.results_of(OutputKind.GRADIENT) if node} == {
        "torch.float32"
    }
