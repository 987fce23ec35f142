"""Pipelines of passes: text, order, statistics, verification."""

import dataclasses
import re
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import PassError, VerificationError
from graphopt.ir.program import Level, Program
from graphopt.ir.structural_hash import structural_hash
from graphopt.nearest import nearest
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.reproducer import reproducible
from graphopt.sizes import format_size, parse_size
from graphopt.verify.meaning import Meaning
from graphopt.verify.verifier import Verifier

_ITEM = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")
_BOOLS = {"true": True, "false": False}
_EXAMPLES = {bool: "true or false", int: "a whole number, or a size such as 8MiB", float: "a number"}


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: whether it changed the program, how long it took, and the counts it left."""

    name: str
    text: str
    changed: bool
    seconds: float
    statistics: dict[str, int | float | str]
    nodes_before: int
    nodes_after: int

    @classmethod
    def of_capture(cls, program: Program, seconds: float) -> "PassRecord":
        """What stands for the capture, in front of the first pass."""
        return cls("capture", "capture", True, seconds, {}, 0, len(program.graph.nodes))


Observer = Callable[[PassRecord, Program], None]  # called after each pass


class Pipeline:
    """Passes in order. `str` gives text that `parse` turns back into the same pipeline."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = list(passes)

    def __str__(self) -> str:
        return ",".join(format_pass(step) for step in self.passes)

    @classmethod
    def parse(cls, text: str, registry: Mapping[str, type[Pass]]) -> "Pipeline":
        """A pipeline such as ``zero{stage=3},bucket{bytes=8MiB}``. Raises PassError for what it does not know."""
        passes: list[Pass] = []
        at = 0
        while at < len(text.rstrip()):
            match = _ITEM.match(text, at)
            if match is None:
                raise PassError(f"the pipeline cannot be read from {text[at:]!r} on; write name{{option=value}},name")
            name, options = match[1], match[2]
            if name not in registry:
                raise PassError(f"there is no pass named {name!r}; {nearest(name, registry)}")
            passes.append(_make(registry[name], options or ""))
            at = match.end()
        return cls(passes)

    def check(self, level: Level, done: Sequence[str] = ()) -> Level:
        """The level that the passes leave; done: names of passes that have run on the program already.

        Raises PassError if they cannot run in this order on a program of `level`.
        """
        done = list(done)
        for step in self.passes:
            missing = step.requires - set(done)
            if missing:
                raise PassError(f"{step.name} needs {', '.join(sorted(missing))} before it")
            against = step.conflicts & set(done)
            if against:
                raise PassError(f"{step.name} cannot run after {', '.join(sorted(against))}; put it before")
            if step.level is not level:
                raise PassError(
                    f"{step.name} works on {step.level.value} programs, and gets one at level {level.value}"
                )
            level = step.produces
            done.append(step.name)
        return level

    def run(
        self,
        program: Program,
        context: PassContext,
        *,
        verify: bool = False,
        observer: Observer | None = None,
        done: Sequence[str] = (),
    ) -> list[PassRecord]:
        """Run all passes on `program`, in place.

        verify: check the program before the first pass and after every one, and that it changed if and only if the
        pass says so. Raises VerificationError with the name of the pass. observer: called after each pass.
        done: names of passes that have run already. A pass that fails leaves a reproducer
        (`graphopt.passes.reproducer`); what is not an error of graphopt's is raised as PassError.
        """
        self.check(program.level, done)
        checker = _Checker(program, context) if verify else None
        records: list[PassRecord] = []
        for index, step in enumerate(self.passes):
            rest = self.passes[index:]
            before = [*done, *(record.name for record in records)]
            with reproducible(program, context, rest, str(Pipeline(rest)), before):
                record = _run(step, program, dataclasses.replace(context, remaining=tuple(rest[1:])))
                if checker is not None:
                    checker.check(step, record)
            records.append(record)
            if observer is not None:
                observer(record, program)
        return records


def format_pass(step: Pass) -> str:
    """A pass with those of its options that differ from the default."""
    default = step.Options()
    options = [
        f"{spec.name}={_format(getattr(step.options, spec.name), spec.name)}"
        for spec in dataclasses.fields(step.Options)
        if getattr(step.options, spec.name) != getattr(default, spec.name)
    ]
    return step.name + (f"{{{','.join(options)}}}" if options else "")


class _Checker:
    """Holds each pass to the rules of programs and to what it says of itself."""

    def __init__(self, program: Program, context: PassContext) -> None:
        self._program = program
        self._verifier = Verifier(context.fake_mode, context.mesh, context.layouts)
        self._hash = structural_hash(program)
        self._meaning = self._checked("before the first pass")

    def check(self, step: Pass, record: PassRecord) -> None:
        """Raises VerificationError with the name of the pass that has just run, if something is wrong."""
        when = f"after {record.text}"
        meaning = self._checked(when)
        before, self._hash = self._hash, structural_hash(self._program)
        if record.changed is (self._hash == before):
            said, found = ("something", "as it was") if record.changed else ("nothing", "another")
            raise VerificationError(f"{when}: it says that it changed {said}, but the program is {found}")
        if step.keeps_values:
            try:
                self._verifier.check_same(self._meaning, meaning, self._program)
            except VerificationError as error:
                raise VerificationError(f"{when}: {error}") from error
        self._meaning = meaning

    def _checked(self, when: str) -> Meaning:
        try:
            return self._verifier.check(self._program)
        except VerificationError as error:
            raise VerificationError(f"{when}: {error}") from error


def _run(step: Pass, program: Program, context: PassContext) -> PassRecord:
    count = len(program.graph.nodes)
    statistics: dict[str, int | float | str] = {}
    started = time.perf_counter()
    changed = step.run(program, dataclasses.replace(context, statistics=statistics))
    seconds = time.perf_counter() - started
    return PassRecord(step.name, format_pass(step), changed, seconds, statistics, count, len(program.graph.nodes))


def _make(kind: type[Pass], text: str) -> Pass:
    fields = [spec.name for spec in dataclasses.fields(kind.Options)]
    types_of = typing.get_type_hints(kind.Options)
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if name not in fields:
            raise PassError(f"{kind.name} has no option {name!r}; {nearest(name, fields)}")
        if not equals:
            raise PassError(f"{kind.name}: option {name!r} has no value; write {name}=value")
        if name in values:
            raise PassError(f"{kind.name} is given option {name!r} twice; say it once")
        values[name] = _typed(kind.name, name, value.strip(), types_of[name])
    return kind(kind.Options(**values))


def _typed(owner: str, name: str, text: str, wanted: Any) -> Any:
    """The value that `text` stands for: a bool, a whole number or size, a float, text, or None where that may be."""
    kinds = typing.get_args(wanted) or (wanted,)
    if type(None) in kinds and text == "none":
        return None
    (kind,) = (kind for kind in kinds if kind is not type(None))
    if kind is bool and text in _BOOLS:
        return _BOOLS[text]
    size = parse_size(text) if kind is int else None
    if size is not None:
        return size
    try:
        if kind is not bool:
            return kind(text)
    except ValueError:
        pass
    raise PassError(f"{owner}: {name}={text} is not of type {kind.__name__}; write {name}={_EXAMPLES[kind]}")


def _format(value: Any, name: str) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return format_size(value) if isinstance(value, int) and name.endswith("bytes") else str(value)
