"""Gradients that are summed over the ranks of a model axis: in which order, in how many calls, and when."""

import functools
import itertools

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt import Plan
from graphopt.cost.communication import communication
from graphopt.cost.hardware import Hardware, Link
from graphopt.cost.simulator import simulate
from graphopt.errors import VerificationError
from graphopt.ir import OutputKind, Phase, Program
from graphopt.ir.collectives import WAIT, collective_of, collectives_of, launch_of, sources_of, waits_of
from graphopt.lowering.passes import pipeline_text
from graphopt.passes.reductions import REDUCTIONS, by_level
from graphopt.verify.verifier import Verifier
from tests.support.programs import lowered
from tests.support.split_models import Blocks, Mlp, tokens
from tests.support.training import Trained, same_bits, train
from tests.support.zoo import ZOO

REDUCE = torch.ops._c10d_functional.all_reduce.default
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALONE = "cp=2,zero.bucket_bytes=18KiB"
WHOLE = "dp=2,cp=2,zero=0,zero.bucket_bytes=18KiB"
SHARDED = "dp=2,cp=2,zero=3,zero.whole_below=64,zero.bucket_bytes=18KiB"


def _model() -> nn.Module:
    """Four layers of 18 KiB."""
    return Blocks(*(Mlp(64) for _ in range(4)), logits=False)


@functools.cache
def _program(text: str, world: int = 2) -> Program:
    return lowered(text, world, _model(), **tokens())[1]


def _sums(program: Program, axis: str = "cp") -> list[fx.Node]:
    return [c.node for c in collectives_of(program) if (c.kind, c.axis) == ("all-reduce", axis)]


def test_gradients_are_summed_in_buckets() -> None:
    one_by_one, in_buckets = _sums(_program("cp=2,zero.bucket_bytes=1")), _sums(_program(ALONE))
    assert len(one_by_one) == 19 and all(len(sources_of(node)) == 1 for node in one_by_one)
    assert len(in_buckets) == 7 and sum(len(sources_of(node)) for node in in_buckets) == 19


def _plans(rank: int, world: int, plans: list[Plan]) -> list[Trained]:
    runs = []
    for plan in plans:
        torch.manual_seed(0)
        model = graphopt.compile(_model(), plan)
        runs.append(train(model, tokens(), lambda model=model, **batch: model(**batch)[0], steps=2))
    return runs


def test_buckets_change_no_bit(ranks) -> None:
    plan = Plan.parse(ALONE).resolve(2)
    text = pipeline_text(plan)
    assert ",bucket" in text
    inline = Plan(mesh={"cp": 2}, passes=text[: text.index(",bucket")])
    for in_buckets, one_by_one in ranks(2).run(_plans, [plan, inline]):
        assert same_bits(in_buckets, one_by_one) == []


def test_stages_agree_in_every_bit(ranks) -> None:
    for sharded, whole in ranks(4).run(_plans, [Plan.parse(text).resolve(4) for text in (SHARDED, WHOLE)]):
        assert same_bits(sharded, whole) == []


@pytest.mark.parametrize(("text", "world"), [(ALONE, 2), (SHARDED, 4), (WHOLE, 4)])
def test_sums_travel_while_backward_computes(text: str, world: int) -> None:
    """Each but the last is waited for behind the launch of the next, which products with weights lie before."""
    program = _program(text, world)
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    products = [place[node] for node in program.compute_nodes(Phase.BACKWARD) if "mm" in str(node.target)]
    for one, behind in itertools.pairwise(_sums(program)):
        wait = place[waits_of(one)[0]]
        assert wait > place[behind]
        assert any(place[one] < product < wait for product in products) or place[behind] > products[-1]


def test_a_step_takes_less_time_where_sums_travel_beside_it() -> None:
    plan = Plan.parse(ALONE).resolve(2)
    text = pipeline_text(plan)
    hardware = Hardware("slow", {"float32": 1e9}, 1e10, 1 << 30, 0.0, Link(1e8, 1e-4))
    model, batch = _model(), tokens()

    def seconds(passes: str) -> float:
        programs: list[Program] = []
        made = Plan(mesh={"cp": 2}, passes=passes).resolve(2)
        graphopt.lowering.lower(model, (), batch, made, observer=lambda _, program: programs.append(program))
        return simulate(programs[-1], made.mesh, hardware).total_seconds

    inline, bucketed = text[: text.index(",bucket")], text[: text.index(",schedule")]
    assert seconds(text) < seconds(bucketed) < seconds(inline)


def test_only_shards_travel_over_the_other_axis() -> None:
    program = _program(SHARDED, 4)
    for node in _sums(program):
        assert all(source.target is WAIT for source in sources_of(node))
        launches = {launch_of(source.args[0])[0] for source in sources_of(node)}  # type: ignore[arg-type, index]
        assert [(launch.kind, launch.axis) for launch in launches] == [("reduce-scatter", "dp")]  # as they came
    moved = communication(program, {"dp": 2, "cp": 2}).bytes
    assert moved["all-reduce", "cp"] == moved["reduce-scatter", "dp"]  # twice a half of a half; a half of the whole


def test_what_is_summed_gathered_and_summed_again_is_in_buckets_of_its_own() -> None:
    """Weights over a vocabulary that `tp` does not divide: of their gradients ranks have parts, and keep the whole."""
    text = "dp=2,cp=2,tp=2,zero=3,zero.whole_below=64,verify=true"
    program = lowered(text, 8, ZOO["llama"].build(), **ZOO["llama"].batch())[1]
    levels = [[collective_of(node) for node in level] for level in by_level(program.compute_nodes())]
    assert [{(c.kind, c.axis) for c in level if c} for level in levels] == [
        {("reduce-scatter", "dp"), ("all-reduce", "cp")},
        {("reduce-scatter", "dp"), ("all-reduce", "cp")},
    ]


def test_gradients_are_summed_over_every_axis_in_the_dtype_of_sums() -> None:
    for (text, world), (reduce, dtype) in itertools.product([(ALONE, 2), (SHARDED, 4)], DTYPES.items()):
        program = _program(f"{text},precision=bf16,precision.reduce={reduce}", world)
        sums = [source for node in _sums(program) if node.target in REDUCTIONS for source in sources_of(node)]
        assert {source.meta["val"].dtype for source in sums} == {dtype}
        assert {node.meta["val"].dtype for _, node in program.results_of(OutputKind.GRADIENT) if node} == {
            torch.float32
        }


@pytest.mark.parametrize("is_twice", [False, True])
@pytest.mark.parametrize("text", [SHARDED, WHOLE])
def test_a_sum_that_is_lost_or_taken_twice_is_found(text: str, is_twice: bool) -> None:
    compilation, program = lowered(text, 4, _model(), **tokens())
    verifier = Verifier(compilation.captured.fake_mode, {"dp": 2, "cp": 2}, compilation.layouts)
    before = verifier.check(program)
    verifier.check_same(before, before, program)
    launched = _sums(program)[0]
    wait = waits_of(launched)[0]
    (reader,) = wait.users
    reader.replace_input_with(wait, _summed_again(program, wait) if is_twice else sources_of(launched)[0])
    with pytest.raises(VerificationError):
        verifier.check_same(before, verifier.check(program), program)


def _summed_again(program: Program, value: fx.Node) -> fx.Node:
    with program.graph.inserting_before(value.next):
        summed = program.graph.call_function(REDUCE, (value, "sum", "cp"))
        again = program.graph.call_function(WAIT, (summed,))
    summed.meta, again.meta = dict(value.meta), dict(value.meta)
    return again
