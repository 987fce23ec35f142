"""The published schedules: each as phases of a rank, which repeat a pattern of computations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from graphopt.errors import PlanError
from graphopt.nearest import nearest
from graphopt.schedules.actions import Action, Schedule, Work

Phases = Sequence[tuple[int, str]]
"""How often, and which pattern: works between blanks, each with the key of the order it takes its next place from."""

Places = Iterator[tuple[int, int]]
"""Stages and microbatches in the order in which they come."""


@dataclass(frozen=True)
class Shape:
    """What a row is made for: numbers of ranks, of microbatches, of stages on a rank; the rank."""

    ranks: int
    microbatches: int
    stages_per_rank: int
    rank: int

    @property
    def hops(self) -> int:
        """How many ranks come after this one."""
        return self.ranks - 1 - self.rank

    @property
    def round(self) -> int:
        """Microbatches that go through one stage in a row, before the rank's next stage has its turn."""
        return self.microbatches // max(1, self.microbatches // self.ranks)

    @property
    def even(self) -> bool:
        """Whether all rounds are of one length."""
        return self.microbatches % self.round == 0

    @property
    def forwards(self) -> int:
        return self.microbatches * self.stages_per_rank


def _all_forwards_first(shape: Shape) -> Phases:
    return (shape.forwards, "F"), (shape.forwards, "B")


def _one_forward_one_backward(shape: Shape) -> Phases:
    return _steady(shape, min(shape.hops, shape.forwards))


def _interleaved(shape: Shape) -> Phases:
    return _steady(shape, min((shape.stages_per_rank - 1) * shape.round + 2 * shape.hops, shape.forwards))


def _steady(shape: Shape, before: int) -> Phases:
    return (before, "F"), (shape.forwards - before, "F B"), (before, "B")


def _zero_bubble(shape: Shape) -> Phases:
    before = min((shape.stages_per_rank - 1) * shape.round + shape.hops, shape.forwards)
    steady = shape.forwards - before
    late = min(shape.rank, steady)
    later = min(shape.rank - late, before)
    return (
        (before, "F"),
        (late, "F I"),
        (steady - late, "F I W"),
        (later, "I"),
        (before - later, "I W"),
        (late + later, "W"),
    )


def _zbv(shape: Shape) -> Phases:
    rank, ranks = shape.rank, shape.ranks
    return (
        (2 * shape.hops + 1, "F0"),
        (rank, "F1 F0"),
        (ranks - rank, "F1 I1 W1"),
        (max(shape.microbatches, 2 * ranks - 1) - 2 * ranks + rank + 1, "F0 I0 W0 F1 I1 W1"),
        (shape.hops, "I0 W0 F1 I1 W1"),
        (rank, "I0 I1"),
        (ranks - rank, "I0 W0"),
        (rank, "W1"),
        (rank, "W0"),
    )


def _dualpipev(shape: Shape) -> Phases:
    rank, hops, odd = shape.rank, shape.hops, shape.rank % 2
    whole = (rank + 1) // 2
    return (
        (2 * hops, "F0"),
        (rank + 1, "F0 F1"),
        (hops, "I1 W F1"),
        (shape.microbatches - 2 * shape.ranks + rank + 1, "F0 B1 F1 B0"),
        (hops, "B1 F1 B0"),
        (whole, "B1 B0"),
        (1 - odd, "B1 I0"),
        (rank + odd - whole, "I1 I0"),
        (hops, "W I0"),
        (rank + 1, "W"),
    )


@dataclass(frozen=True)
class _Kind:
    """phases: of a row. fewest, most: stages a rank; usual: where nobody says how many.

    bent: stages go down the ranks and back up, two on each; else they go round. in_rounds: a rank's stages take turns
    every round of microbatches; else when all are through.
    """

    phases: Callable[[Shape], Phases]
    fewest: int = 1
    usual: int = 1
    most: int | None = None
    bent: bool = False
    in_rounds: bool = False


_KINDS = {
    "gpipe": _Kind(_all_forwards_first, most=1),
    "1f1b": _Kind(_one_forward_one_backward, most=1),
    "interleaved": _Kind(_interleaved, fewest=2, usual=2, in_rounds=True),
    "breadth-first": _Kind(_all_forwards_first, usual=2),
    "zero-bubble": _Kind(_zero_bubble, in_rounds=True),
    "zbv": _Kind(_zbv, fewest=2, usual=2, most=2, bent=True),
    "dualpipev": _Kind(_dualpipev, fewest=2, usual=2, most=2, bent=True),
}
NAMES = tuple(_KINDS)


def published(name: str, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """A published schedule; on each stage, the gradients of microbatches are summed in ascending order.

    gpipe: Huang et al. 2019 (arXiv:1811.06965). 1f1b, interleaved: Narayanan et al. 2021 (arXiv:2104.04473), the latter
    also for microbatches that are no multiple of the ranks, as torch.distributed.pipelining has it. breadth-first:
    Lamy-Poirier 2023 (arXiv:2211.05953). zero-bubble: ZB-H1 of Qi et al. 2023 (arXiv:2401.10241), interleaved where a
    rank has several stages; zbv: their ZB-V. dualpipev: DeepSeek-AI 2024 (arXiv:2412.19437), folded into a V.
    stages_per_rank: None for the fewest that the schedule has a form for, and two for breadth-first.
    Raises PlanError for an unknown name, and for numbers that the schedule is not made for.
    """
    kind = _KINDS.get(name)
    if kind is None:
        raise PlanError(f"no schedule is called '{name}'; {nearest(name, NAMES)}")
    stages_per_rank = kind.usual if stages_per_rank is None else stages_per_rank
    _check_numbers(name, kind, Shape(ranks, microbatches, stages_per_rank, 0))
    there = range(ranks)
    turns = [*there, *reversed(there)] if kind.bent else [*there] * stages_per_rank
    rows = tuple(_row(kind, Shape(ranks, microbatches, stages_per_rank, rank)) for rank in there)
    return Schedule(name, microbatches, tuple(turns), rows)


def _check_numbers(name: str, kind: _Kind, shape: Shape) -> None:
    least, most = kind.fewest, kind.most or shape.stages_per_rank
    if not least <= shape.stages_per_rank <= most:
        choice = least if shape.stages_per_rank < least else most
        raise PlanError(
            f"'{name}' has no form with {shape.stages_per_rank} stages a rank; the nearest number is {choice}"
        )
    if shape.ranks < 1 or shape.microbatches < 1:
        raise PlanError(
            f"'{name}' on {shape.ranks} ranks for {shape.microbatches} microbatches: the least is 1 of each"
        )
    if name == "dualpipev" and shape.microbatches < 2 * shape.ranks:
        raise PlanError(
            f"'{name}' takes at least as many microbatches as stages: {2 * shape.ranks}, not {shape.microbatches}; "
            "'zbv' takes any number"
        )
    if kind.in_rounds and not shape.even and shape.stages_per_rank > 1:
        others = (replace(shape, microbatches=number) for number in range(1, 2 * shape.microbatches))
        choice = min(
            (other.microbatches for other in others if other.even), key=lambda number: abs(number - shape.microbatches)
        )
        raise PlanError(
            f"'{name}' on {shape.ranks} ranks takes microbatches in rounds of one length, and {shape.microbatches} "
            f"make none; the nearest number is {choice}"
        )


def _row(kind: _Kind, shape: Shape) -> tuple[Action, ...]:
    if kind.bent:
        ends = {"0": shape.rank, "1": 2 * shape.ranks - 1 - shape.rank}
        forwards = {key: _endless(stage) for key, stage in ends.items()}
        backwards = {key: _endless(stage) for key, stage in ends.items()}
    else:
        stages = range(shape.rank, shape.ranks * shape.stages_per_rank, shape.ranks)
        in_a_row = shape.round if kind.in_rounds else shape.microbatches
        forwards = {"": _in_turns(stages, shape.microbatches, in_a_row)}
        backwards = {"": _in_turns(stages[::-1], shape.microbatches, in_a_row)}
    actions = _play(kind.phases(shape), forwards, backwards)
    return tuple(action for action in actions if action.microbatch < shape.microbatches)


def _endless(stage: int) -> Places:
    return ((stage, microbatch) for microbatch in count())


def _in_turns(stages: Sequence[int], microbatches: int, in_a_row: int) -> Places:
    for first in range(0, microbatches, in_a_row):
        for stage in stages:
            for microbatch in range(first, min(first + in_a_row, microbatches)):
                yield stage, microbatch


def _play(phases: Phases, forwards: Mapping[str, Places], backwards: Mapping[str, Places]) -> Iterator[Action]:
    """The actions of the phases. Weight gradients come in the order of the input gradients of their key, or of all."""
    pending: list[tuple[str, tuple[int, int]]] = []
    for times, pattern in phases:
        for token in pattern.split() * times:
            work, key = Work(token[0]), token[1:]
            if work is Work.WEIGHT_GRADIENT:
                index = next(index for index, (other, _) in enumerate(pending) if key in ("", other))
                _, (stage, microbatch) = pending.pop(index)
            else:
                stage, microbatch = next((forwards if work is Work.FORWARD else backwards)[key])
            if work is Work.INPUT_GRADIENT:
                pending.append((key, (stage, microbatch)))
            yield Action(stage, work, microbatch)
