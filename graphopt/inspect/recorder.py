"""Programs as text after each pass, kept as they go by."""

from graphopt.errors import PassError
from graphopt.ir import Program
from graphopt.ir.printer import diff, format_program
from graphopt.nearest import nearest
from graphopt.passes.pipeline import PassRecord


class Recorder:
    """An observer of a compilation that prints the program after capture and after every pass."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._levels: list[str] = []
        self._texts: list[str] = []

    def observe(self, record: PassRecord, program: Program) -> None:
        self._names.append(record.name)
        self._levels.append(program.level.value)
        self._texts.append(format_program(program))

    def keep_last(self, passes: int) -> None:
        """Forget all but the last capture and `passes` after it: a compilation that was given up came before."""
        for recorded in (self._names, self._levels, self._texts):
            del recorded[: len(recorded) - passes - 1]

    def last(self, level: str) -> str:
        """The last pass (or the capture) that left a program of this level."""
        return [name for name, left in zip(self._names, self._levels, strict=True) if left == level][-1]

    def after(self, name: str) -> str:
        """The program after the pass of that name. Raises PassError if there was none."""
        return self._texts[self._index(name)]

    def difference(self, name: str) -> str:
        """What the pass of that name changed, as a unified diff; the whole program, for the capture."""
        index = self._index(name)
        return diff(self._texts[index - 1] if index else "", self._texts[index])

    def _index(self, name: str) -> int:
        if name not in self._names:
            raise PassError(f"the pipeline has no pass {name!r}; {nearest(name, self._names)}")
        return self._names.index(name)
