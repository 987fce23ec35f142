"""Closed forms against programs traced at the sizes they are evaluated at, and against what runs allocate."""

from collections.abc import Callable

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from bench.live import most_alive
from graphopt.cost.closed_form import ClosedForm, closed_form
from graphopt.cost.lives import OPTIMIZERS, Around
from graphopt.cost.memory import memory
from graphopt.errors import GraphoptError
from graphopt.ir import InputKind, ParameterLayout, Program
from graphopt.plan import Plan
from graphopt.runtime.parameters import choose_layouts
from tests.ir.built import Hand
from tests.support.programs import Mlp, lowered
from tests.support.zoo import VOCABULARY, ZOO, Batch

SHARDED = "zero=3,zero.whole_below=0,zero.bucket_bytes=1MiB"


def _tokens(rows: int, length: int) -> Batch:
    ids = torch.randint(1, VOCABULARY, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def _images(rows: int, _: int) -> Batch:
    return {"pixel_values": torch.randn(rows, 3, 32, 32), "labels": torch.randint(0, 2, (rows,))}


def _vectors(rows: int, _: int) -> Batch:
    return {"x": torch.randn(rows, 16)}


def _program(plan: str, world: int, model: nn.Module, batch: Batch) -> Program:
    return lowered(plan, world, model, **batch)[1]


def _form(plan: str, world: int, model: nn.Module, batch: Batch) -> ClosedForm:
    layouts = choose_layouts(model, Plan.parse(plan).resolve(world))
    return closed_form(_program(plan, world, model, batch), {"dp": world}, layouts)


@pytest.fixture(scope="module")
def llama() -> ClosedForm:
    """Traced at 3 x 16 tokens on 2 ranks."""
    return _form(f"{SHARDED},dynamic=batch,sequence", 2, ZOO["llama"].build(), _tokens(3, 16))


def test_it_gives_what_a_program_traced_at_those_sizes_has(llama: ClosedForm) -> None:
    plan, rows, length, ranks = f"{SHARDED},dynamic=batch,sequence", 5, 80, 4
    wanted = memory(_program(plan, ranks, ZOO["llama"].build(), _tokens(rows, length)), {"dp": ranks})
    found = llama.at(batch=rows, sequence=length, ranks=ranks)
    assert (found.peak_bytes, found.by_category) == (wanted.peak_bytes, wanted.by_category)


@pytest.mark.parametrize(
    ("build", "batch", "plan", "ranks"),
    [
        (Mlp, _vectors, "zero=0", 4),
        (Mlp, _vectors, f"{SHARDED},remat=selective", 8),
        (Mlp, _vectors, "zero=1,zero.whole_below=0", 8),
        (ZOO["vit"].build, _images, "zero=2,zero.bucket_bytes=1MiB", 4),
    ],
)
def test_it_gives_what_a_program_with_fixed_sizes_has(
    build: Callable[[], nn.Module], batch: Callable[[int, int], Batch], plan: str, ranks: int
) -> None:
    """The same peak, though with symbolic sizes backward may read a size off a value, which is then saved for it."""
    found = _form(f"{plan},dynamic=batch", 2, build(), batch(4, 0)).at(batch=6, ranks=ranks)
    wanted = memory(_program(plan, ranks, build(), batch(6, 0)), {"dp": ranks})
    assert found.peak_bytes == wanted.peak_bytes
    assert found.by_category["activations"] >= wanted.by_category["activations"]


def test_it_gives_what_runs_at_other_sizes_reach() -> None:
    plan = "zero=0,dynamic=batch,sequence"
    form = _form(plan, 1, ZOO["llama"].build(), _tokens(3, 16))
    assert form.example == {"batch": 3, "sequence": 16}
    model = graphopt.compile(ZOO["llama"].build(), plan, example_inputs=_tokens(3, 16))
    for rows, length in ((2, 40), (7, 8)):
        assert form.at(batch=rows, sequence=length).peak_bytes == most_alive(model, _tokens(rows, length))


def test_the_expressions_are_those_of_a_hand_count() -> None:
    """Three matrices of 1,024 bytes, of which each rank has a part; x and its gradient of 64 bytes a row."""
    form = _form(f"{SHARDED},dynamic=batch", 2, Mlp(), _vectors(4, 0))
    batch, ranks = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "ranks"))
    assert form.by_category["parameters"] == form.by_category["gradients"] == 3072 / ranks
    assert form.by_category["batch"] == 64 * batch + 4
    assert form.by_category["gathered"] == 3072
    assert form.to_dict()["by_category"]["parameters"] == "3072/ranks"


def test_the_state_of_an_optimizer_is_an_expression_too() -> None:
    plan = Plan.parse(SHARDED).resolve(2)
    program = _program(SHARDED, 2, Mlp(), _vectors(4, 0))
    form = closed_form(program, {"dp": 2}, choose_layouts(Mlp(), plan), around=Around(OPTIMIZERS["adamw"]))
    assert str(form.by_category["optimizer"]) == "12 + 6144/ranks"


@settings(max_examples=10)
@given(batch=st.integers(2, 64), sequence=st.integers(2, 400), ranks=st.sampled_from([2, 4, 8]))
def test_the_candidates_hold_the_peak(llama: ClosedForm, batch: int, sequence: int, ranks: int) -> None:
    sizes = {"batch": batch, "sequence": sequence, "ranks": ranks}
    values = {symbol: sympy.Integer(sizes[symbol.name]) for symbol in llama.peak.free_symbols}
    bytes_at = [candidate.bytes.xreplace(values) for candidate in llama.candidates]
    assert llama.at(**sizes).peak_bytes == max(bytes_at) == llama.peak.xreplace(values).doit()
    assert len(llama.candidates) < 20


def test_allocators_round_at_every_size() -> None:
    program = _program("zero=0,dynamic=batch", 1, Mlp(), _vectors(4, 0))
    form = closed_form(program, {"dp": 1}, allocation_bytes=512)
    other = _program("zero=0", 1, Mlp(), _vectors(9, 0))
    assert form.at(batch=9).peak_bytes == memory(other, {"dp": 1}, allocation_bytes=512).peak_bytes


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"bach": 3}, "'bach'; the nearest is 'batch'"),
        ({"batch": 1}, "batch=1 wants a program of its own; the nearest that this serves is 2"),
        ({"ranks": 1}, "ranks=1 wants a program of its own"),
        ({"ranks": 3}, "do not divide by 3 ranks, other than by 2"),
    ],
)
def test_sizes_of_another_program_are_refused(llama: ClosedForm, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(GraphoptError) as raised:
        llama.at(**sizes)
    assert said in str(raised.value)


def test_what_is_not_known_of_shards_is_said() -> None:
    """A sum over the rows of a shard has as many elements on any number of ranks, but no layout tells it."""
    hand = Hand()
    shard = hand.input(4, 6, kind=InputKind.SHARD, name="weight")
    total = hand.call(torch.ops.aten.sum.dim_IntList, shard, [0])
    layout = ParameterLayout("weight", (8, 6), torch.float32, "dp", 2, 0)
    with pytest.raises(GraphoptError, match="sum_dim_int_list changes the size of a shard"):
        closed_form(hand.program(total), {"dp": 2}, {"weight": layout})
