"""Which mutants the verifier refuses without running them."""

from graphopt.errors import VerificationError
from graphopt.ir.snapshot import copied
from tests.mutation.mutators import MUTATORS
from tests.mutation.subjects import NAMES, Subject, subject


def killed(mutant: str, one: Subject) -> bool | None:
    """Whether the verifier refuses a mutant; None where the mutator does not apply."""
    program = copied(one.program)
    if not MUTATORS[mutant](program):
        return None
    try:
        one.check(program)
    except VerificationError:
        return True
    return False


def kill_table() -> dict[str, dict[str, bool | None]]:
    """For each mutator and each program, whether the verifier kills the mutant."""
    return {mutant: {name: killed(mutant, subject(name)) for name in NAMES} for mutant in MUTATORS}
