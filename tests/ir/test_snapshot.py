"""A snapshot keeps a program as it was while passes change it."""

from graphopt.ir import Program
from graphopt.ir.printer import format_program
from graphopt.ir.snapshot import Snapshot, copied
from graphopt.ir.structural_hash import structural_hash
from graphopt.lowering import lower
from graphopt.passes.pipeline import PassRecord
from graphopt.plan import Plan
from tests.support.zoo import ZOO


def test_what_a_pass_does_later_is_not_in_a_snapshot() -> None:
    taken: list[tuple[Snapshot, str, str]] = []

    def take(record: PassRecord, program: Program) -> None:
        taken.append((Snapshot(program), format_program(program), structural_hash(program)))

    plan = Plan.parse("zero=3,zero.whole_below=0,precision=bf16").resolve(2)
    lower(ZOO["t5"].build().train(), (), ZOO["t5"].batch(), plan, observer=take)
    assert len(taken) == 9 and len({digest for _, _, digest in taken}) >= 5
    for snapshot, text, digest in taken:
        restored = snapshot.restored()
        assert format_program(restored) == text and structural_hash(restored) == digest


def test_a_copy_can_be_changed_alone() -> None:
    programs: list[Program] = []
    lower(ZOO["odd"].build(), (), ZOO["odd"].batch(), Plan().resolve(1), observer=lambda _, p: programs.append(p))
    text = format_program(programs[-1])
    twin = copied(programs[-1])
    twin.inputs.pop()
    twin.graph.erase_node(twin.output_node)
    assert format_program(programs[-1]) == text
