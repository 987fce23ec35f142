"""What the digest of a program depends on, and what not."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from graphopt.ir import Input, InputKind, Level, Phase, Program, annotate
from graphopt.ir.collectives import collectives_of
from graphopt.ir.structural_hash import structural_hash
from tests.support.programs import lowered

aten = torch.ops.aten
PLAN = "zero=3,zero.whole_below=0"


def rename_every_node(program: Program) -> None:
    for index, node in enumerate(program.graph.nodes):
        node._rename(f"renamed_{index}")


def state_other_sources(program: Program) -> None:
    for node in program.compute_nodes():
        annotate(node, source="elsewhere.py:1", module="m", made_by="someone")


@pytest.mark.parametrize("change", [rename_every_node, state_other_sources])
def test_names_and_places_do_not_count(change: Callable[[Program], None]) -> None:
    _, program = lowered(PLAN)
    before = structural_hash(program)
    change(program)
    assert structural_hash(program) == before


def swap_launches(program: Program) -> None:
    launched = [c.node for c in collectives_of(program)]
    launched[0].prepend(launched[1])


def change_the_axis(program: Program) -> None:
    node = collectives_of(program)[0].node
    node.args = (*node.args[:-1], "tp")


def change_a_phase(program: Program) -> None:
    annotate(program.compute_nodes(Phase.BACKWARD)[0], phase=Phase.FORWARD)


def make_resident(program: Program) -> None:
    annotate(program.compute_nodes()[0], resident=True)


def change_a_dtype(program: Program) -> None:
    node = next(n for n in program.compute_nodes() if n.target is aten.tanh.default)
    node.meta["val"] = node.meta["val"].double()


def change_an_operator(program: Program) -> None:
    next(n for n in program.compute_nodes() if n.target is aten.tanh.default).target = aten.sin.default


def change_a_role(program: Program) -> None:
    program.inputs[0] = Input(InputKind.BUFFER, program.inputs[0].name)


def move_a_role_to_the_other_side(program: Program) -> None:
    program.inputs.append(program.outputs.pop(0))  # type: ignore[arg-type]


def change_the_level(program: Program) -> None:
    program.level = Level.FORWARD


def tie_a_parameter(program: Program) -> None:
    program.aliases["another"] = program.inputs[0].name


def add_a_constant(program: Program) -> None:
    program.constants["c"] = torch.zeros(1)


@pytest.mark.parametrize(
    "change",
    [
        swap_launches, change_the_axis, change_a_phase, make_resident, change_a_dtype, change_an_operator,
        change_a_role, move_a_role_to_the_other_side, change_the_level, tie_a_parameter, add_a_constant,
    ],
)  # fmt: skip
def test_what_is_computed_counts(change: Callable[[Program], None]) -> None:
    _, program = lowered(PLAN)
    before = structural_hash(program)
    change(program)
    assert structural_hash(program) != before


def test_the_digest_is_the_same_in_another_process() -> None:
    script = (
        "from tests.support.programs import lowered; from graphopt.ir.structural_hash import structural_hash; "
        f"print(structural_hash(lowered({PLAN!r})[1]))"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert other == structural_hash(lowered(PLAN)[1])
