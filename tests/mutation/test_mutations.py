"""Programs that are broken on purpose: the verifier names nearly all without running them, a run the others."""

from collections.abc import Iterator

import pytest
import torch

from graphopt.errors import VerificationError
from graphopt.inspect.outcome import program_outcome
from graphopt.ir.collectives import check_ranks, collectives_of
from graphopt.ir.snapshot import copied
from tests.mutation.mutators import MUTATORS
from tests.mutation.subjects import NAMES, Subject, subject
from tests.mutation.table import kill_table


@pytest.mark.parametrize("name", NAMES)
def test_the_subjects_themselves_are_correct(name: str) -> None:
    one = subject(name)
    one.check(copied(one.program))


def test_the_verifier_kills_nearly_all_mutants_without_running_them() -> None:
    table = kill_table()
    assert len(table) >= 40 and len(NAMES) >= 6
    unused = [mutant for mutant, row in table.items() if not any(flag is not None for flag in row.values())]
    assert unused == [], "each mutator applies somewhere"
    killed = [flag for row in table.values() for flag in row.values() if flag is not None]
    survivors = [(mutant, name) for mutant, row in table.items() for name, flag in row.items() if flag is False]
    assert sum(killed) >= 0.95 * len(killed), survivors
    for mutant, name in survivors:
        assert _differs(mutant, subject(name)), f"{mutant} of {name} lives on"


def _differs(mutant: str, one: Subject) -> bool:
    """Whether a run of the mutant gives something else than a run of the program."""
    program = copied(one.program)
    MUTATORS[mutant](program)
    wanted, found = program_outcome(one.program, one.workload), program_outcome(program, one.workload)
    return wanted.keys() != found.keys() or any(
        not torch.equal(a, b) for key in wanted for a, b in zip(wanted[key], found[key], strict=True)
    )


def _broken_on_one_rank() -> Iterator[tuple[str, bool]]:
    """Collectives that are right by themselves, but not those of the other rank."""
    one = subject("Llama, stage 3")
    for change in ("swap", "drop", "other shape", "nothing"):
        program = copied(one.program)
        first, second = (c.node for c in collectives_of(program)[:2])
        if change == "swap":
            second.append(first)
        elif change == "drop":
            first.args = (first.args[0][:-1], *first.args[1:])  # type: ignore[index]
        elif change == "other shape":
            value = first.meta["val"]
            first.meta["val"] = [value[0][:1], *value[1:]]
        try:
            check_ranks([one.program, program])
            yield change, False
        except VerificationError as error:
            assert "rank 0 calls" in str(error) and "rank 1" in str(error)
            yield change, True


def test_ranks_that_call_other_collectives_are_found_statically() -> None:
    assert dict(_broken_on_one_rank()) == {"swap": True, "drop": True, "other shape": True, "nothing": False}
