"""Which variant each operator of a program runs, and why."""

from collections import Counter
from typing import NamedTuple

from graphopt.dimensions.signature import operands_of
from graphopt.ir import Program
from graphopt.triton_kernels.registration import family_of


class Use(NamedTuple):
    """calls: of an operator, which a variant computes. why: for people."""

    operator: str
    calls: int
    variant: str
    why: str


def uses(program: Program) -> list[Use]:
    """A row for each operator and choice, in order of appearance, as `graphopt.triton_kernels.choice` now chooses.

    Raises KernelError where what is asked for cannot be had.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    for node in program.compute_nodes():
        family = family_of(node.target)
        if family is not None:
            choice = family.choose(operands_of(node)[0].meta["val"])
            found[str(node.target).removesuffix(".default"), *choice] += 1
    return [Use(operator, count, variant, why) for (operator, variant, why), count in found.items()]
