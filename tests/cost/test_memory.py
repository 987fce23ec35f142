"""Predicted bytes against hand counts and against what a run allocates."""

import gc

import pytest
import torch
from torch import nn

import graphopt
from bench.live import Live, most_alive, state_of
from bench.memory import POLICIES, STAGES, Case, cases, measure, peak_on_this_rank
from bench.models import DIMENSIONS, MODELS
from bench.segments import is_in_segment, mapped_segments
from graphopt.cost.communication import communication
from graphopt.cost.lives import OPTIMIZERS, Around, OptimizerState
from graphopt.cost.memory import Memory, memory
from graphopt.ir import OutputKind
from tests.ir.built import Hand, functional
from tests.support.programs import Mlp, lowered
from tests.support.zoo import CONVNET, ZOO

MATRIX = 16 * 16 * 4


@pytest.mark.parametrize(
    ("stage", "parameters", "gathered"),
    [(0, 3 * MATRIX, 0), (1, 0, 3 * MATRIX), (2, 0, 3 * MATRIX), (3, 3 * MATRIX // 2, 2 * MATRIX)],
)
def test_model_state_by_category(stage: int, parameters: int, gathered: int) -> None:
    """In stages 1 and 2 the shard is a part of the gathered whole; in stage 3 two buckets are there at a time."""
    _, program = lowered(f"zero={stage},zero.whole_below=0,zero.bucket_bytes={MATRIX}")
    found = memory(program, {"dp": 2}).by_category
    assert found.get("parameters", 0) == parameters
    assert found.get("gathered", 0) == gathered
    assert found["gradients"] == 3 * MATRIX // (1 if stage == 0 else 2) + 4 * 16 * 4, "and that of the input"


def test_the_peak_is_the_largest_of_the_timeline() -> None:
    _, program = lowered("zero=3,zero.whole_below=0")
    found = memory(program, {"dp": 2})
    assert found.peak_bytes >= max(found.timeline) and len(found.timeline) == len(program.compute_nodes())


@pytest.mark.parametrize(("world", "stage", "times"), [(2, 0, 2), (4, 1, 2), (4, 2, 2), (8, 3, 3)])
def test_bytes_are_the_closed_form(world: int, stage: int, times: int) -> None:
    _, program = lowered(f"zero={stage},zero.whole_below=0", world)
    found = communication(program, {"dp": world})
    assert found.total_bytes == pytest.approx(times * 3 * MATRIX * (world - 1) / world)


def _most_alive(name: str, plan: str, rank: int, world: int) -> tuple[int, Memory]:
    """The measured peak of a third step, and what was predicted."""
    torch.manual_seed(0)
    entry = {**ZOO, "convnet": CONVNET}[name]
    model: nn.Module = graphopt.compile(entry.build(), plan)
    part = entry.part(entry.batch(), rank, world)
    batch = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in part.items()}
    measured = most_alive(model, batch, is_elsewhere=is_in_segment, waits=world > 1)
    return measured, graphopt.report(model).memory


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", "zero=0"),
        ("t5", "zero=0"),
        ("bert", "zero=0,remat=full"),  # statistics of norms that nobody reads
        ("convnet", "zero=0"),  # buffers that forward updates
        ("mixed", "zero=0"),  # a loss whose storage is larger than it
    ],
)
def test_the_peak_is_what_a_run_on_one_rank_reaches(name: str, plan: str) -> None:
    measured, predicted = _most_alive(name, plan, 0, 1)
    assert predicted.peak_bytes == measured


def _on_a_rank(rank: int, world: int, name: str, plan: str) -> tuple[int, int, Memory]:
    """The peak of live storages, the bytes of shared segments of all ranks, and what was predicted."""
    gc.collect()
    before = mapped_segments()
    live, predicted = _most_alive(name, plan, rank, world)
    return live, mapped_segments() - before, predicted


SLACK = 1 << 16  # segments are mapped in whole pages
PLANS = [
    ("llama", "zero=0"),
    ("llama", "zero=2,zero.bucket_bytes=65536"),
    ("llama", "zero=3,zero.prefetch=2,zero.bucket_bytes=65536"),
    ("llama", "zero=3,precision=bf16"),
    ("gpt2", "zero=1,remat=full"),
    ("llama", "zero=3,remat=selective,zero.prefetch=0,zero.bucket_bytes=65536"),
]
SPLITS = [("gpt2", "tp=2,tensor.sequence=true"), ("llama", "cp=2"), ("mixtral", "ep=2,remat=full")]


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_the_peak_is_what_a_run_on_two_ranks_reaches(ranks, name: str, plan: str) -> None:
    for live, segments, predicted in ranks(2).run(_on_a_rank, name, f"{plan},zero.whole_below=0,transport=group"):
        assert (live, segments) == (predicted.peak_bytes, 0)


@pytest.mark.parametrize(("name", "plan"), SPLITS)
def test_the_peak_with_layers_split_over_two_ranks(ranks, name: str, plan: str) -> None:
    for live, segments, predicted in ranks(2).run(_on_a_rank, name, f"{plan},transport=group"):
        assert (live, segments) == (predicted.peak_bytes, 0)


@pytest.mark.parametrize(("name", "plan"), PLANS[:3])
def test_the_peak_through_shared_memory(ranks, name: str, plan: str) -> None:
    for live, segments, predicted in ranks(2).run(_on_a_rank, name, f"{plan},zero.whole_below=0"):
        assert live == predicted.peak_bytes - predicted.by_category["segments"]
        assert 0 < segments <= 2 * (predicted.by_category["segments"] + SLACK)


@pytest.mark.long
def test_all_models_at_all_sizes_in_all_stages_with_and_without_rematerialization() -> None:
    found = list(cases(list(MODELS), list(DIMENSIONS), list(STAGES), list(POLICIES)))
    for case, peak in zip(found, measure(found), strict=True):
        assert -0.005 <= peak.deviation <= 0.01, case


@pytest.mark.parametrize(("name", "limit"), [("llama", 0.0), ("gpt2", 0.01), ("mixtral", 0.0)])
def test_operators_allocate_next_to_nothing_else(name: str, limit: float) -> None:
    """As the allocator sees it, with their workspace; beside it the state of a generator for dropout."""
    peak = peak_on_this_rank(Case(name, "small", 0, None), 1)
    assert peak.allocated is not None and 0 <= peak.allocated - peak.predicted <= limit * peak.predicted


def test_gradients_that_are_added_to_are_there_throughout() -> None:
    batch = {"x": torch.randn(4, 16)}
    program = lowered("zero=0", 1, Mlp(), **batch)[1]
    predicted = memory(program, {"dp": 1}, around=Around(accumulates=True))
    model = graphopt.compile(Mlp(), "zero=0")
    for _ in range(2):
        model(**batch).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with Live([*state_of(model, batch), *gradients]) as live:
        loss = model(**batch)
        loss.backward()
    assert predicted.peak_bytes == live.most
    assert predicted.peak_bytes == memory(program, {"dp": 1}).peak_bytes + 3 * MATRIX


def test_the_state_of_an_optimizer_is_what_it_holds() -> None:
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 16)).backward()
    optimizer.step()
    held = sum(value.untyped_storage().nbytes() for state in optimizer.state.values() for value in state.values())
    program = lowered("zero=0", 1)[1]
    with_state = memory(program, {"dp": 1}, around=Around(OPTIMIZERS["adamw"]))
    assert with_state.by_category["optimizer"] == held == 3 * (2 * MATRIX + 4)
    assert with_state.peak_bytes == memory(program, {"dp": 1}).peak_bytes + held
    sharded = lowered("zero=3,zero.whole_below=0", 2)[1]
    narrow = memory(sharded, {"dp": 2}, around=Around(OptimizerState(2, torch.bfloat16)))
    assert narrow.by_category["optimizer"] == 3 * MATRIX // 2


def test_allocators_round_every_storage_up() -> None:
    hand = Hand()
    total = hand.call(torch.ops.aten.add.Tensor, hand.input(200, 3), hand.input(3))
    program = hand.program(total)
    assert memory(program, {"dp": 1}, allocation_bytes=512).by_category == {"batch": 2560 + 512, "outputs": 2560}


def test_several_tensors_travel_packed_and_one_does_not() -> None:
    """Two shards of 24 bytes: 48 leave and 192 arrive in buffers, and 192 are unpacked when the first is waited for."""
    hand = Hand()
    shards = [hand.input(2, 3), hand.input(2, 3)]
    launched = hand.call(functional.all_gather_into_tensor_coalesced.default, shards, 4, "dp")
    waited = [hand.waited(launched, index) for index in range(2)]
    found = memory(hand.program(hand.call(torch.ops.aten.add.Tensor, *waited)), {"dp": 4})
    assert found.by_category == {"batch": 48, "communication": 240, "gathered": 192, "outputs": 96}
    # launch, item, wait (which unpacks both), item, wait, sum (which then drops them)
    assert found.timeline == [288, 288, 240, 240, 240, 144]
    assert found.peak_bytes == 48 + 240 + 192 and found.peak_node == waited[0].name

    hand = Hand()
    alone = hand.input(2, 3)
    launched = hand.call(functional.all_gather_into_tensor_coalesced.default, [alone], 4, "dp")
    assert memory(hand.program(hand.waited(launched, 0)), {"dp": 4}).by_category == {"batch": 24, "gathered": 96}


def test_what_is_resident_is_there_from_the_start() -> None:
    _, program = lowered("zero=1,zero.whole_below=0")
    found = memory(program, {"dp": 2})
    assert found.timeline[0] >= 3 * MATRIX and found.timeline[-1] >= 3 * MATRIX


def test_gradients_live_to_the_end() -> None:
    _, program = lowered("zero=0", world=1)
    gradients = [node for _, node in program.results_of(OutputKind.GRADIENT, OutputKind.BATCH_GRADIENT)]
    assert len(gradients) == 4
    assert memory(program, {"dp": 1}).timeline[-1] == 3 * MATRIX + 2 * 4 * 16 * 4 + 4 + 4 + 3 * MATRIX, (
        "state, x, tangent, loss"
    )
