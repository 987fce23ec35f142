"""The fastest way to run a step within a number of bytes: what backward computes again, and what leaves until then."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.cost.duration import compute_seconds, copy_seconds
from graphopt.cost.frontier import Frontier
from graphopt.cost.memory import Memory, memory
from graphopt.cost.moving import Choice, Choices, Moving
from graphopt.cost.operations import work_of
from graphopt.cost.refine import Refinement
from graphopt.cost.repetition import Outcome, Timeline
from graphopt.errors import PassError
from graphopt.ir import OutputKind, Program
from graphopt.ir.snapshot import copied
from graphopt.passes.base import PassContext
from graphopt.passes.build import Builder
from graphopt.passes.elsewhere import frees_memory, keep_elsewhere, movable
from graphopt.passes.repeat import repeat_in_backward
from graphopt.sizes import readable_size

_CALLS = 1_000_000  # what about a second goes through
_STARTS = 1 / 4  # of what is tried, at most
_GUESSES = 8  # by the timeline, before the rest is halved again and again


@dataclass(frozen=True)
class Budget:
    """What a step may hold. bytes: in all; or share: of what it saves for backward, 1 for all of that."""

    bytes: int | None
    share: float | None

    def limit(self, unlimited: Memory) -> int:
        """Bytes. unlimited: the step that computes nothing again."""
        if self.bytes is not None:
            return self.bytes
        assert self.share is not None
        return unlimited.peak_bytes - int((1 - self.share) * unlimited.by_category.get("activations", 0))


@dataclass(frozen=True)
class Elsewhere:
    """Where values may go meanwhile, ``host`` or ``disk``, and how large they must be."""

    place: str
    least_bytes: int


@dataclass(frozen=True)
class Repeatable:
    """Pure forward calls that may be computed again.

    within_layers: where what goes from one layer to the next is saved, so that each can be looked at by itself;
    anywhere: also that, found when it is asked for.
    """

    within_layers: Collection[fx.Node]
    anywhere: Callable[[], Collection[fx.Node]]


@dataclass(frozen=True)
class Fitting:
    """A choice, the bytes that it leaves at the peak, and the bytes that were allowed."""

    choice: Choice
    peak_bytes: int
    limit: int


def choose(
    program: Program,
    context: PassContext,
    repeatable: Repeatable,
    budget: Budget,
    elsewhere: Elsewhere | None = None,
) -> Fitting:
    """The first choice of the frontier whose peak, when the rest of the pipeline has run, is within the budget.

    Choices do not depend on the budget, so a smaller one never leads to a higher peak, nor to a shorter step. Raises
    PassError for a budget that none keeps.
    """
    with _without_collections():
        return _Search(program, context, repeatable, elsewhere).within(budget)


def apply(builder: Builder, choice: Choice, place: str, reasons: tuple[str, str]) -> tuple[int, int]:
    """Rewrite the program so: how many calls backward repeats, and how many values leave. reasons: for each of both."""
    repeated = repeat_in_backward(builder, choice.repeated, reasons[0])
    return repeated, len(keep_elsewhere(builder, set(choice.moved), place, reasons[1])) if choice.moved else 0


class _Search:
    """Peaks of choices: fast and near from the timeline of the program as it is, exact from what becomes of it."""

    def __init__(
        self,
        program: Program,
        context: PassContext,
        repeatable: Repeatable,
        elsewhere: Elsewhere | None,
    ) -> None:
        self._program = program
        self._context = context
        self._place = elsewhere.place if elsewhere is not None else ""

        @functools.cache
        def seconds(node: fx.Node) -> float:
            return compute_seconds(work_of(node), context.hardware)

        self._timeline = Timeline(program, seconds, _held(program, context))
        frontier = Frontier(program, repeatable.within_layers, seconds)
        repeated: Sequence[Collection[fx.Node]] = frontier
        marks: Sequence[int] = frontier.marks
        tries = _CALLS // len(program.graph.nodes)
        if len(frontier) < _STARTS * tries:
            refined = Refinement(program, repeatable.anywhere(), self._timeline).choices(frontier, tries)
            # What the timeline thinks no better may be, once gathers and reductions are among what is alive.
            repeated = [*refined, frontier[len(frontier) - 1]]
            marks = range(len(repeated))
        self._choices = Choices(repeated, marks, _moving(program, context, seconds, elsewhere))
        self._near: dict[int, Outcome] = {}
        self._exact: dict[int, Memory] = {}

    def within(self, budget: Budget) -> Fitting:
        limit = budget.limit(self._memory(0))
        choice = self._first_within(limit)
        return Fitting(self._choices[choice], self._memory(choice).peak_bytes, limit)

    def _first_within(self, limit: int) -> int:
        if self._memory(0).peak_bytes <= limit:
            return 0
        low = 0
        for floor in self._floors():
            low, high = self._narrowed(limit, low, floor)
            if self._memory(high).peak_bytes <= limit:
                return high
        raise PassError(_too_small(limit, min(map(self._memory, self._floors()), key=lambda found: found.peak_bytes)))

    def _floors(self) -> list[int]:
        """Where the peak may be lowest: by the timeline, and where most is computed again."""
        marks = self._choices.marks
        return sorted({min(marks, key=lambda mark: (self._outcome(mark).peak_bytes, mark)), marks[-1]})

    def _narrowed(self, limit: int, low: int, high: int) -> tuple[int, int]:
        """Neighbours between `low`, which is too large, and `high`: one too large, and one that fits or is `high`."""
        last = low
        for tries in itertools.count():
            if high - low <= 1:
                break
            offset = self._memory(last).peak_bytes - self._outcome(last).peak_bytes
            near = self._first_near(limit - offset, low, high) if tries < _GUESSES else (low + high) // 2
            last = min(max(near, low + 1), high - 1)
            if self._memory(last).peak_bytes <= limit:
                high = last
            else:
                low = last
        return low, high

    def _first_near(self, limit: int, low: int, high: int) -> int:
        """The first choice between two whose peak is about within `limit`."""
        marks = [mark for mark in self._choices.marks if low < mark < high] + [high]
        end = next((mark for mark in marks if self._outcome(mark).peak_bytes <= limit), high)
        begin = max([low, *(mark for mark in marks if mark < end)])
        while end - begin > 1:
            middle = (begin + end) // 2
            if self._outcome(middle).peak_bytes <= limit:
                end = middle
            else:
                begin = middle
        return end

    def _outcome(self, choice: int) -> Outcome:
        if choice not in self._near:
            given = self._choices[choice]
            self._near[choice] = self._timeline.after(given.repeated, given.moved)
        return self._near[choice]

    def _memory(self, choice: int) -> Memory:
        if choice not in self._exact:
            self._exact[choice] = _finished(self._program, self._context, self._choices[choice], self._place)
        return self._exact[choice]


def _finished(program: Program, context: PassContext, choice: Choice, place: str) -> Memory:
    """The memory of the program when all passes have run."""
    # Also where gradients are not reduced, so that a backward half fits the forward half of one that is.
    context = dataclasses.replace(context, reduce_gradients=True, statistics={})
    copy = copied(program)
    own = dict(zip(program.graph.nodes, copy.graph.nodes, strict=True))
    theirs = Choice([own[node] for node in choice.repeated], [own[node] for node in choice.moved])
    apply(Builder(copy, context, ""), theirs, place, ("", ""))
    for step in context.remaining:
        step.run(copy, context)
    return memory(copy, context.mesh, context.shared_axes)


def _moving(
    program: Program, context: PassContext, seconds: Callable[[fx.Node], float], elsewhere: Elsewhere | None
) -> Moving | None:
    if elsewhere is None or not frees_memory(elsewhere.place, context.hardware):
        return None

    def copying(node: fx.Node) -> float:
        return copy_seconds(node, elsewhere.place, context.hardware)

    return Moving(program, movable(program, elsewhere.least_bytes), seconds, copying)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """A few copies of the program are made: to look for garbage in all of them, again and again, takes as long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _held(program: Program, context: PassContext) -> Callable[[fx.Node], int | None]:
    """Bytes of a result that stay: of the gradient of a sharded parameter, this rank's shard."""
    shards: dict[fx.Node, int] = {}
    for role, node in program.results_of(OutputKind.GRADIENT):
        layout = context.layouts.get(role.name)
        if node is not None and layout is not None and not layout.is_whole:
            shards[node] = math.prod(layout.shard_shape) * layout.dtype.itemsize
    return shards.get


def _too_small(limit: int, floor: Memory) -> str:
    """Why no choice keeps a budget."""
    kinds: Counter[str] = Counter()
    for life in floor.at_peak():
        kinds[life.category] += life.size
    parts = ", ".join(f"{readable_size(size)} {kind}" for kind, size in kinds.most_common() if size)
    return (
        f"rematerialize: a step within {readable_size(limit)} is out of reach; the nearest is "
        f"{floor.peak_bytes} bytes ({readable_size(floor.peak_bytes)}), at {floor.peak_node}: {parts}"
    )
