"""What a pass did, by identity of nodes: nothing is lost, and the new order follows from what is said to have moved."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.inspect.inspection import Inspection
from graphopt.inspect.provenance import Changes, changes
from graphopt.inspect.recorder import NodeRecord, Stage
from graphopt.ir import NodeFacts
from graphopt.passes.pipeline import PassRecord
from tests.support.inspected import inspected


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspected()


def _stage(identities: list[int], reads: dict[int, tuple[int, ...]] | None = None) -> Stage:
    def record(identity: int) -> NodeRecord:
        inputs = tuple(f"n{source}" for source in (reads or {}).get(identity, ()))
        return NodeRecord(f"n{identity}", "call", "op", ", ".join(inputs), inputs, "float32[2]", 8, "", "pure", FACTS)

    made_by = PassRecord("step", "step", True, 0.0, {}, len(identities), len(identities))
    return Stage(made_by, "step", [record(identity) for identity in identities], identities)


FACTS = NodeFacts()


def _names(found: Changes) -> dict[str, list[str]]:
    return {
        "made": [record.name for record, _ in found.made],
        "changed": [record.name for _, record in found.changed],
        "removed": [record.name for record, _ in found.removed],
        "moved": [record.name for record in found.moved],
    }


def test_one_node_that_moves_is_the_only_one_said_to() -> None:
    found = changes(_stage([1, 2, 3, 4, 5]), _stage([1, 5, 2, 3, 4]))
    assert _names(found) == {"made": [], "changed": [], "removed": [], "moved": ["n5"]}


def test_what_is_gone_names_what_its_readers_read_now() -> None:
    before = _stage([1, 2, 3], {3: (1, 2)})
    after = _stage([1, 4, 3], {3: (1, 4)})
    found = changes(before, after)
    assert _names(found) == {"made": ["n4"], "changed": ["n3"], "removed": ["n2"], "moved": []}
    assert found.removed[0][1] == ["n4"]


@given(st.permutations(range(8)), st.sets(st.integers(0, 7)), st.sets(st.integers(8, 11)))
def test_without_what_moved_the_order_is_as_it_was(order: list[int], gone: set[int], fresh: set[int]) -> None:
    after = [identity for identity in order if identity not in gone] + sorted(fresh)
    found = changes(_stage(list(range(8))), _stage(after))
    moved = {record.name for record in found.moved}
    rest = [f"n{identity}" for identity in after if identity < 8 and f"n{identity}" not in moved]
    assert rest == sorted(rest)
    assert {record.name for record, _ in found.removed} == {f"n{identity}" for identity in gone}
    assert {record.name for record, _ in found.made} == {f"n{identity}" for identity in fresh}


def test_every_node_of_a_compilation_is_accounted_for(inspection: Inspection) -> None:
    for before, after, found in zip(inspection.stages, inspection.stages[1:], inspection.changes[1:], strict=False):
        kept = {r.name for r in before.nodes if r.kind != "output"} - {r.name for r, _ in found.removed}
        if before.level == after.level:
            assert kept | {r.name for r, _ in found.made} >= {r.name for r in after.nodes if r.kind != "output"}
        else:  # nothing of a forward program is a node of the step program
            assert {r.name for r, _ in found.made} == {r.name for r in after.nodes}


def test_zero_says_what_the_parameters_gave_way_to(inspection: Inspection) -> None:
    found = inspection.changes[inspection.stage_after("zero")]
    gone = {record.name: places for record, places in found.removed}
    assert gone["lm_head_weight"], "its readers read a gathered parameter"
    made = {record.name: origin for record, origin in found.made}
    assert any("all_gather" in name and origin == "t" for name, origin in made.items())


def test_what_the_schedule_gives_a_reason_for_is_what_moved(inspection: Inspection) -> None:
    found = inspection.changes[inspection.stage_after("schedule")]
    assert not found.made and not found.removed and not found.changed
    launched = [record for record in found.moved if "all_gather" in record.name]
    assert launched and all("schedule: launched before" in record.facts.reasons[-1] for record in launched)
