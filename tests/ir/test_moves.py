"""Moves are linear, and what autograd derives from them are their adjoints: <y, J x> = <J^T y, x> over all ranks."""

import operator
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from graphopt._torch import new_fake_mode
from graphopt.ir import Effect, Input, InputKind, Level, Output, OutputKind, Phase, Program, effect_of, moves
from graphopt.ir.collectives import WAIT, collectives_of
from tests.support.moved import Call, Values, forward, results, step

aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """kind: R, V, P or S, and of S where it is cut. shape: of the whole value."""

    kind: str
    shape: tuple[int, ...]
    dim: int = 0
    blocks: int = 1
    chunk: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.kind != "S":
            return self.shape
        return (*self.shape[: self.dim], self.blocks * self.chunk, *self.shape[self.dim + 1 :])

    @property
    def extent(self) -> int:
        return self.shape[self.dim] // self.blocks

    def is_alike(self, *, gradient: bool) -> bool:
        """Whether the value, or the gradient, is the same on all ranks."""
        return self.kind in ("R", "P") if gradient else self.kind in ("R", "V")

    def drawn(self, generator: torch.Generator, ranks: int, *, gradient: bool) -> Values:
        values = [torch.randn(self.local_shape, generator=generator, dtype=torch.float64) for _ in range(ranks)]
        return [values[0]] * ranks if self.is_alike(gradient=gradient) else values

    def product(self, value: Values, gradient: Values) -> float:
        """The inner product of the two over all ranks."""
        each = [float((v * g).sum()) for v, g in zip(value, gradient, strict=True)]
        return each[0] if self.kind == "R" else sum(each)


@st.composite
def parts(draw: st.DrawFn, form: Form, ranks: int) -> Form:
    """A way to cut a whole value."""
    dim = draw(st.integers(0, len(form.shape) - 1))
    blocks = draw(st.sampled_from([b for b in (1, 2, 3) if form.shape[dim] % b == 0]))
    return Form("S", form.shape, dim, blocks, -(-form.shape[dim] // blocks // ranks) + draw(st.integers(0, 1)))


@st.composite
def steps(draw: st.DrawFn, form: Form, ranks: int) -> tuple[Call, Form]:
    """A move of a value in that form, and the form that it comes to."""
    cut = draw(parts(form, ranks))
    where = (cut.dim, cut.blocks, cut.chunk, ranks, "tp")
    own = (form.dim, form.blocks, form.extent, ranks, "tp")
    whole = [replace(form, kind=kind) for kind in ("R", "V", "P")]
    choices: dict[str, list[tuple[Call, Form]]] = {
        "R": [
            ((moves.ENTER, ("tp",)), whole[1]),
            ((moves.PART, (*where, False)), cut),
            ((moves.FIRST, ("tp",)), whole[2]),
        ],
        "V": [((moves.PART, (*where, True)), cut)],
        "P": [((moves.LEAVE, ("tp",)), whole[0]), ((moves.SCATTER_SUM, where), cut)],
        "S": [((moves.GATHER, (*own, False)), whole[0]), ((moves.GATHER, (*own, True)), whole[1])],
    }
    if form.kind == "S" and form.blocks == 1 and form.chunk * ranks == form.extent:
        for dim, size in enumerate(form.shape):
            if dim != form.dim and size % ranks == 0:
                exchanged = replace(form, dim=dim, chunk=size // ranks)
                choices["S"].append(((moves.ALL_TO_ALL, (dim, form.dim, ranks, "tp")), exchanged))
    return draw(st.sampled_from(choices[form.kind]))


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, Form, list[Call], Form]:
    """Ranks, the form of what goes in, moves, and the form of what comes out."""
    ranks = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3)))
    form = Form(draw(st.sampled_from("RVPS")), shape)
    start = form = draw(parts(form, ranks)) if form.kind == "S" else form
    calls = []
    for _ in range(draw(st.integers(1, 4))):
        call, form = draw(steps(form, ranks))
        calls.append(call)
    return ranks, start, calls, form


@hypothesis.given(chains(), st.integers(0, 1 << 30))
def test_gradients_are_adjoint(chain: tuple[int, Form, list[Call], Form], seed: int) -> None:
    ranks, start, calls, end = chain
    mesh = {"dp": 2, "tp": ranks}
    program, mode = forward(start.local_shape, calls)
    generator = torch.Generator().manual_seed(seed)
    x = [start.drawn(generator, ranks, gradient=False) for _ in range(mesh["dp"])]
    y = [end.drawn(generator, ranks, gradient=True) for _ in range(mesh["dp"])]
    value = [each for group in x for each in group]
    (moved,) = results(program, mesh, [value])

    step(program, mode, mesh)
    image, gradient = results(program, mesh, [value, [each for group in y for each in group]])
    for dp, cotangent in enumerate(y):
        group = slice(dp * ranks, (dp + 1) * ranks)
        assert all(torch.equal(a, b) for a, b in zip(image[group], moved[group], strict=True))
        assert not end.is_alike(gradient=False) or all(torch.equal(each, image[group][0]) for each in image[group])
        assert not start.is_alike(gradient=True) or all(
            torch.equal(each, gradient[group][0]) for each in gradient[group]
        )
        there, back = end.product(image[group], cotangent), start.product(x[dp], gradient[group])
        assert there == pytest.approx(back, rel=1e-10, abs=1e-10)


SHAPE = (4, 12, 2)
PART = (1, 3, 2, 2, "tp")
WHOLE = (1, 3, 3, 2, "tp")
MEANT: list[tuple[Call, list[str], list[str]]] = [
    ((moves.ENTER, ("tp",)), [], ["all-reduce"]),
    ((moves.LEAVE, ("tp",)), ["all-reduce"], []),
    ((moves.PART, (*PART, False)), [], ["all-gather"]),
    ((moves.PART, (*PART, True)), [], []),
    ((moves.GATHER, (*WHOLE, False)), ["all-gather"], []),
    ((moves.GATHER, (*WHOLE, True)), ["all-gather"], ["reduce-scatter"]),
    ((moves.SCATTER_SUM, PART), ["reduce-scatter"], ["all-gather"]),
    ((moves.ALL_TO_ALL, (0, 2, 2, "tp")), ["all-to-all"], ["all-to-all"]),
    ((moves.FIRST, ("tp",)), [], []),
]


@pytest.mark.parametrize(("call", "forwards", "backwards"), MEANT)
def test_steps_hold_the_collectives_that_a_move_consists_of(
    call: Call, forwards: list[str], backwards: list[str]
) -> None:
    program, mode = forward(SHAPE, [call])
    step(program, mode, {"tp": 2})
    for phase, kinds in ((Phase.FORWARD, forwards), (Phase.BACKWARD, backwards)):
        found = [collective.kind for collective in collectives_of(program) if collective.phase is phase]
        assert found == kinds


@pytest.mark.parametrize(("target", "silent"), [(moves.ENTER, Phase.FORWARD), (moves.LEAVE, Phase.BACKWARD)])
def test_what_is_an_identity_leaves_nothing(target: Any, silent: Phase) -> None:
    program, mode = forward(SHAPE, [(target, ("tp",))])
    step(program, mode, {"tp": 2})
    assert not program.compute_nodes(silent)
    assert [node.target for node in program.compute_nodes()] == [torch.ops._c10d_functional.all_reduce.default, WAIT]


@pytest.mark.parametrize("call", [call for call, _, _ in MEANT] + [(moves.MAXIMUM, ("tp",))])
def test_a_move_has_the_shape_of_what_it_consists_of(call: Call) -> None:
    """Below autograd it is one operator, above it its parts."""
    target, arguments = call
    with new_fake_mode():
        parts = target(torch.empty(SHAPE, dtype=torch.bfloat16), *arguments)
        with torch.inference_mode():
            alone = target(torch.empty(SHAPE, dtype=torch.bfloat16), *arguments)
    assert (alone.shape, alone.dtype, alone.stride()) == (parts.shape, parts.dtype, parts.stride())


def test_only_what_is_of_the_rank_alone_may_be_moved_and_repeated() -> None:
    graph = fx.Graph()
    for targets, effect in ((moves.MOVES, Effect.COLLECTIVE), (moves.OF_RANK, Effect.PURE)):
        for target in targets:
            assert effect_of(graph.call_function(target)) is effect  # type: ignore[arg-type]


def test_the_maximum_is_a_constant_to_gradients() -> None:
    """As the softmax over a split dimension subtracts it."""
    program, mode = forward((3,), [(moves.MAXIMUM, ("tp",))])
    (node,) = program.compute_nodes()
    with program.graph.inserting_after(node):
        shifted = program.graph.call_function(aten.sub.Tensor, (node.args[0], node))
    shifted.meta["val"] = node.meta["val"]
    program.set_results([shifted], program.outputs)
    step(program, mode, {"tp": 2})
    assert [collective.reduction for collective in collectives_of(program)] == ["max"]
    rows = [torch.tensor([1.0, -2.0, 5.0]).double(), torch.tensor([3.0, -1.0, -5.0]).double()]
    tangents = [torch.randn(3).double() for _ in rows]
    image, gradient = results(program, {"tp": 2}, [rows, tangents])
    assert [each.tolist() for each in image] == [[-2.0, -1.0, 0.0], [0.0, 0.0, -10.0]]
    assert all(torch.equal(a, b) for a, b in zip(gradient, tangents, strict=True))


def _of_any_length(example: int) -> Program:
    """A step that moves [3, length] of any length, cut into parts of half the length, rounded up."""
    mode, graph = new_fake_mode(), fx.Graph()
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC])
    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.empty(3, example, dtype=torch.float64), symbolic_context=context)

    def call(target: Any, *arguments: Any) -> fx.Node:
        node = graph.call_function(target, arguments)
        with mode:
            node.meta["val"] = target(*fx.map_arg(arguments, lambda argument: argument.meta["val"]))
        return node

    length = call(aten.sym_size.int, x, 1)
    half = call(operator.floordiv, call(operator.add, length, 1), 2)
    cut, whole = (1, 1, half, 2, "tp"), (1, 1, length, 2, "tp")
    part = call(moves.PART, call(moves.ENTER, x, "tp"), *cut, True)
    part = call(moves.PART, call(moves.GATHER, part, *whole, True), *cut, True)
    first = call(moves.FIRST, call(moves.GATHER, part, *whole, False), "tp")
    graph.output((call(moves.SCATTER_SUM, first, *cut),))
    roles = [Input(InputKind.BATCH, "x", requires_grad=True)]
    program = Program(fx.GraphModule({}, graph), roles, [Output(OutputKind.USER, "y")], Level.FORWARD, {})
    step(program, mode, {"tp": 2})
    return program


@pytest.mark.parametrize("example", [6, 7])
def test_one_program_moves_any_length(example: int) -> None:
    program = _of_any_length(example)
    for length in (3, 8, 9, 64):
        x = torch.randn(3, length, dtype=torch.float64)
        y = [torch.randn(3, -(-length // 2), dtype=torch.float64) for _ in range(2)]
        image, gradient = results(program, {"tp": 2}, [[x, x], y])
        assert torch.equal(torch.cat(image, 1)[:, :length], x)
        assert torch.equal(gradient[0], torch.cat(y, 1)[:, :length]) and torch.equal(*gradient)
