"""Emitted source that is broken on purpose is refused, with function, line and name."""

import re
from collections.abc import Callable

import pytest

from graphopt.emit.check import check_source
from graphopt.errors import VerificationError
from graphopt.ir import Program
from tests.support.programs import lowered


def _source() -> tuple[str, dict[str, Program]]:
    compilation, _ = lowered("zero=3,zero.whole_below=0")
    halves = compilation.halves
    assert halves.backward is not None
    return compilation.report.source, {"forward": halves.forward, "backward": halves.backward}


def release_early(lines: list[str]) -> None:
    at = _find(lines, "    del ")
    lines[at - 1], lines[at] = lines[at], lines[at - 1]


def never_release(lines: list[str]) -> None:
    del lines[_find(lines, "    del ")]


def release_twice(lines: list[str]) -> None:
    at = _find(lines, "    del ")
    lines.insert(at, lines[at])


def read_after_release(lines: list[str]) -> None:
    at = _find(lines, "    del ")
    name = lines[at].split()[1].rstrip(",")
    after = _find(lines, " = aten_", at + 1)
    lines[after] = re.sub(r"\(\w+", f"({name}", lines[after], count=1)


def swap_calls(lines: list[str]) -> None:
    """Two gathers, each with the takes of its items: every value is still made before it is read."""
    calls = [i for i, line in enumerate(lines) if "_runtime.collectives.all_gather" in line]
    lines.insert(calls[0], lines.pop(calls[1]))


def leave_a_call_out(lines: list[str]) -> None:
    at = _find(lines, " = aten_tanh")
    lines[at] = lines[at].replace("aten_tanh", "aten_cos").replace(" = ", "_other = ", 1)


def lose_a_function(lines: list[str]) -> None:
    at = _find(lines, "def backward")
    lines[at] = lines[at].replace("backward", "backwards")


def _find(lines: list[str], text: str, start: int = 0) -> int:
    return next(i for i, line in enumerate(lines) if i >= start and text in line)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (release_early, r"forward, line \d+: \w+ is (read after its release|released before it is made)"),
        (never_release, r"forward: \w+.* never released"),
        (release_twice, r"forward, line \d+: \w+ is released after its release"),
        (read_after_release, r"forward, line \d+: \w+ is read after its release"),
        (swap_calls, r"forward: \w+ stands where the program has \w+"),
        (leave_a_call_out, r"forward, line \d+: \w+ is read before it is made"),
        (lose_a_function, r"no function backward"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_source_is_refused(breaks: Callable[[list[str]], None], message: str) -> None:
    source, programs = _source()
    check_source(source, programs)
    lines = source.splitlines()
    breaks(lines)
    with pytest.raises(VerificationError, match=message):
        check_source("\n".join(lines) + "\n", programs)
