"""Where to cut a row of calls into stages of a pipeline: an exact dynamic program over the lines between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import GraphoptError
from graphopt.sizes import format_size

_SLACK = 1.02  # of the least time of the slowest stage, which fewer bytes between stages may cost


@dataclass(frozen=True)
class Lines:
    """The lines along which a row of calls may be cut, the first before all of them and the last behind.

    Each is an array of one number a line. seconds, state_bytes, saved_bytes, parameters: of all calls before it, what
    they take in a step, what parameters with gradients and optimizer state hold, what one microbatch saves for
    backward, and how many of them read parameters. crossing_bytes: what goes over the line, of one microbatch.
    """

    seconds: NDArray[np.float64]
    state_bytes: NDArray[np.int64]
    saved_bytes: NDArray[np.int64]
    parameters: NDArray[np.int64]
    crossing_bytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.seconds)


def balanced(lines: Lines, live: Sequence[int], memory_bytes: int | None = None) -> list[int]:
    """The lines, by number, between stages of which the slowest takes the least time that there is.

    Within 2% of that, those over which the fewest bytes go. Every stage reads parameters. live: of each stage, how many
    microbatches it holds at most at a time; memory_bytes: what each may hold, None for any. Raises GraphoptError if
    there are not enough lines, or if no cut leaves every stage as little.
    """
    most = len(np.unique(lines.parameters)) - 1
    if len(live) > most:
        raise GraphoptError(f"{len(live)} stages are more than can be cut so that each has parameters; choose {most}")
    seconds = _between(lines.seconds)
    allowed = {count: _allowed(lines, count, memory_bytes) for count in set(live)}
    slowest, _ = _least([np.where(allowed[count], seconds, np.inf) for count in live], np.maximum)
    if not np.isfinite(slowest):
        raise GraphoptError(_too_little(lines, live, memory_bytes or 0))
    short = seconds <= slowest * _SLACK
    crossing = np.broadcast_to(lines.crossing_bytes.astype(np.float64), seconds.shape)
    return _least([np.where(allowed[count] & short, crossing, np.inf) for count in live], np.add)[1]


def _between(sums: NDArray[Any]) -> NDArray[Any]:
    """[from, to]: what lies between two lines."""
    lying: NDArray[Any] = sums[None, :] - sums[:, None]
    return lying


def _allowed(lines: Lines, live: int, memory_bytes: int | None) -> NDArray[np.bool_]:
    """[from, to]: whether the calls between two lines may be a stage."""
    fits = _between(lines.parameters) > 0
    return fits if memory_bytes is None else fits & (_held(lines, live) <= memory_bytes)


def _held(lines: Lines, live: int) -> NDArray[np.int64]:
    held: NDArray[np.int64] = _between(lines.state_bytes) + live * _between(lines.saved_bytes)
    return held


def _least(costs: Sequence[NDArray[np.float64]], join: Callable[..., NDArray[np.float64]]) -> tuple[float, list[int]]:
    """The least joint cost of stages, each [from, to], that follow one another from the first line to the last."""
    best, choices = costs[0][0], []
    for cost in costs[1:]:
        joint = join(best[:, None], cost)
        choices.append(joint.argmin(axis=0))
        best = joint.min(axis=0)
    chosen = [len(best) - 1]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-1]]))
    return float(best[-1]), chosen[:0:-1]


def _too_little(lines: Lines, live: Sequence[int], memory_bytes: int) -> str:
    """What is wrong where no cut fits, and how much memory the best one takes."""
    held = [np.where(_allowed(lines, count, None), _held(lines, count).astype(np.float64), np.inf) for count in live]
    needed, _ = _least(held, np.maximum)
    given = format_size(memory_bytes)
    return f"no cut into {len(live)} stages leaves each at most {given}; the nearest takes {format_size(int(needed))}"
