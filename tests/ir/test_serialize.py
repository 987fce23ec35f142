"""Programs survive JSON, and passes make of the copy what they make of the original."""

import json
import math
import operator
from typing import Any

import pytest
import torch
from torch import fx

from graphopt._torch import new_fake_mode
from graphopt.errors import GraphoptError
from graphopt.ir import Input, InputKind, Level, Output, OutputKind, Program
from graphopt.ir.printer import format_program
from graphopt.ir.serialize import from_dict, to_dict
from graphopt.ir.serialize_operators import operator_at
from graphopt.ir.serialize_values import ValueReader, ValueWriter, read_tensor, written_tensor
from graphopt.ir.snapshot import copied
from graphopt.ir.structural_hash import structural_hash
from graphopt.lowering import lower
from graphopt.lowering.passes import pipeline_text
from graphopt.passes import REGISTRY
from graphopt.passes.base import PassContext
from graphopt.passes.pipeline import PassRecord, Pipeline
from graphopt.plan import Plan
from graphopt.verify.meaning import meaning_of
from graphopt.verify.value_numbers import ValueNumbers
from tests.ir.built import Hand
from tests.support.zoo import CONVNET, ZOO

MODELS = {**ZOO, "convnet": CONVNET}
PLANS = ["zero=0", "zero=1,precision=bf16,dynamic=batch", "zero=3,zero.whole_below=0,dynamic=batch,sequence"]


def _there_and_back(program: Program) -> tuple[Program, Any]:
    mode = new_fake_mode()
    return from_dict(json.loads(json.dumps(to_dict(program))), mode), mode


def _stated(program: Program) -> list[str]:
    """Everything stated of each value, symbols as text."""
    return [repr(node.meta.get("val")) for node in program.graph.nodes]


@pytest.mark.parametrize("text", PLANS)
@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "odd", "convnet"])
def test_programs_of_every_pass_survive(name: str, text: str) -> None:
    def check(record: PassRecord, program: Program) -> None:
        again, _ = _there_and_back(program)
        assert format_program(again) == format_program(program)
        assert structural_hash(again) == structural_hash(program)
        assert _stated(again) == _stated(program)
        assert [n.meta["graphopt"] for n in again.compute_nodes()] == [
            n.meta["graphopt"] for n in program.compute_nodes()
        ]
        assert again.aliases == program.aliases and again.reduced == program.reduced
        for key, value in program.constants.items():
            assert torch.equal(again.constants[key], value) and again.constants[key].dtype == value.dtype

    plan = Plan.parse(f"verify=false,{text}").resolve(2)
    lower(MODELS[name].build().train(), (), MODELS[name].batch(), plan, observer=check)


@pytest.mark.parametrize(
    ("name", "text"), [*(("llama", text) for text in PLANS), ("t5", PLANS[2]), ("convnet", PLANS[2]), ("odd", PLANS[1])]
)
def test_the_rest_of_a_pipeline_does_the_same_to_the_copy(name: str, text: str) -> None:
    plan = Plan.parse(f"verify=false,{text}").resolve(2)
    taken: list[tuple[str, Program, Any, Program]] = []

    def keep(record: PassRecord, program: Program) -> None:
        taken.append((record.name, *_there_and_back(program), copied(program)))

    compilation = lower(MODELS[name].build().train(), (), MODELS[name].batch(), plan, observer=keep)
    passes = Pipeline.parse(pipeline_text(plan), REGISTRY).passes
    names, wanted = [each[0] for each in taken], taken[-1][3]
    for index, (_, program, mode, _) in enumerate(taken[:-1]):
        context = PassContext(
            mode,
            dict(plan.mesh),
            compilation.layouts,
            gradient_outputs=frozenset(
                role.name
                for (role, _), seeded in zip(program.results_of(OutputKind.USER), compilation.seeded, strict=True)
                if seeded
            ),
            reduce_dtype=plan.precision.reduce_dtype if plan.precision else None,
        )
        is_traced_anew = program.level is Level.FORWARD
        Pipeline(passes[index:]).run(program, context, done=names[1 : index + 1])
        if plan.dynamic and is_traced_anew:  # where a trace first reads a symbol depends on what torch has cached
            numbers = ValueNumbers(compilation.layouts)
            found, expected = (meaning_of(each, numbers, compilation.layouts) for each in (program, wanted))
            assert found.outputs == expected.outputs and found.draws == expected.draws
        else:
            assert structural_hash(program) == structural_hash(wanted), f"from after {names[index]} on"


VALUES: list[Any] = [
    None, True, 3, -0.0, 2.5, math.inf, "text", [1, [2.0]], (1, (2, [])), {"a": (1,), 2: None}, slice(1, None, 2),
    torch.bfloat16, torch.strided, torch.channels_last, torch.device("cuda:1"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_arguments_of_every_kind_survive(value: Any) -> None:
    written = json.loads(json.dumps(ValueWriter().written(value)))
    found = ValueReader(new_fake_mode(), {}).read(written)
    assert found == value and type(found) is type(value) and repr(found) == repr(value)


def test_not_a_number_survives() -> None:
    assert math.isnan(ValueReader(new_fake_mode(), {}).read(ValueWriter().written(math.nan)))


DTYPES = [
    torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3, 2), (0, 4)])
def test_constants_of_every_dtype_survive(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.randn(shape) * 3).to(dtype)
    found = read_tensor(json.loads(json.dumps(written_tensor(value))))
    assert found.dtype == dtype and found.shape == value.shape
    assert torch.equal(found.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_names_are_kept_whatever_order_they_were_given_in() -> None:
    hand = Hand()
    x = hand.input(3)
    for _ in range(3):
        x = hand.call(torch.ops.aten.neg.default, x)
    program = hand.program(x)
    first, second, third = program.compute_nodes()
    second.replace_all_uses_with(first)
    program.graph.erase_node(second)
    first.append(third)
    again, _ = _there_and_back(program)
    assert [n.name for n in again.graph.nodes] == [n.name for n in program.graph.nodes]


def _of_one_node(node_of: Any) -> Program:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((node_of(graph, x),))
    roles = [Input(InputKind.BATCH, "x")], [Output(OutputKind.USER, "0")]
    return Program(fx.GraphModule(torch.nn.Module(), graph), *roles, Level.STEP, {})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda g, x: g.call_function(torch.ops.higher_order.cond, (x,)), "cond calls cond, which is neither"),
        (lambda g, x: g.call_function(lambda v: v, (x,)), "calls <function"),
        (lambda g, x: g.call_method("neg", (x,)), "neg is a call_method node"),
        (lambda g, x: g.call_function(operator.mul, (x, 1j)), "mul holds 1j, a complex, which cannot be written"),
    ],
)
def test_what_cannot_be_written_is_named(made: Any, message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        to_dict(_of_one_node(made))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("aten.add.Tensr", "no operator aten.add.Tensr; the nearest is 'Tensor'"),
        ("operator:getitems", "no operator operator:getitems; the nearest is 'getitem'"),
        ("no_such_module:f", "no function no_such_module:f"),
    ],
)
def test_an_operator_that_is_not_there_is_told_the_nearest(path: str, message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        operator_at(path)
