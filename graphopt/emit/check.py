"""Whether emitted source does what its program says: the same calls in the same order, each value released once.

Emitted functions have one statement a line (an assignment, a ``del`` or the ``return``), so lines are read, not parsed:
it takes a tenth of the time.
"""

import re
from collections.abc import Mapping

from graphopt.errors import VerificationError
from graphopt.ir import Program

_FUNCTION = re.compile(r"^def (\w+)\(.*\):\n((?:    .*\n)*)", re.MULTILINE)
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_NAME = re.compile(r"(?<![\w.])[^\W\d]\w*(?!\w)(?!=)")  # no attribute, and no keyword of a call


def check_source(source: str, programs: Mapping[str, Program]) -> None:
    """Raises VerificationError, with function and line, for a value that is read after its release, or released late.

    A value is released by ``del`` after its last use; those returned and inputs that nothing reads are not.
    """
    found = {match[1]: match for match in _FUNCTION.finditer(source)}
    for name, program in programs.items():
        if name not in found:
            raise VerificationError(f"the emitted source has no function {name}")
        _Function(name, program).check(found[name][2].splitlines())


class _Function:
    """The values of one function: made so far, alive now."""

    def __init__(self, name: str, program: Program) -> None:
        self._name = name
        self._program = program
        self._wanted = [node.name for node in program.graph.nodes if node.op != "output"]
        self._known = set(self._wanted)
        self._made: list[str] = []
        self._alive: set[str] = set()

    def check(self, lines: list[str]) -> None:
        for number, line in enumerate(lines, start=1):
            statement = line.strip()
            if statement.startswith("#"):
                continue
            if statement.startswith("del "):
                self._release(_names(statement[4:]), number)
            else:
                stored, equals, value = statement.partition(" = ")
                self._read(_names(value if equals else statement), number)
                made = _names(stored) if equals else []
                self._made += made
                self._alive.update(made)
        self._check_end()

    def _read(self, names: list[str], line: int) -> None:
        for name in names:
            if name in self._known and name not in self._alive:
                raise VerificationError(f"{self._name}, line {line}: {name} is read {self._when(name)}")

    def _release(self, names: list[str], line: int) -> None:
        for name in names:
            if name not in self._alive:
                raise VerificationError(f"{self._name}, line {line}: {name} is released {self._when(name)}")
            self._alive.remove(name)

    def _when(self, name: str) -> str:
        return "after its release" if name in self._made else "before it is made"

    def _check_end(self) -> None:
        if self._made != self._wanted:
            pairs = zip([*self._made, "the end"], [*self._wanted, "the end"], strict=False)
            found, wanted = next((a, b) for a, b in pairs if a != b)
            raise VerificationError(f"{self._name}: {found} stands where the program has {wanted}")
        unread = {node.name for node in self._program.placeholders if not node.users}
        kept = self._alive - unread - {node.name for node in self._program.results if node is not None}
        if kept:
            raise VerificationError(f"{self._name}: {', '.join(sorted(kept))} is never released")


def _names(text: str) -> list[str]:
    names: list[str] = _NAME.findall(_STRING.sub("", text))
    return names
