"""``graphopt-inspect replay FOLDER``: what a failing pass left behind, run once more."""

import json
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graphopt.errors import GraphoptError
from graphopt.inspect.request import write_text
from graphopt.passes.pipeline import Pipeline, format_pass
from graphopt.passes.reproducer import Reproducer


@dataclass(frozen=True)
class Replayed:
    """What happened: nothing (error is None), or an error in the pass `failed`.

    where: file, line and function in which it was raised, for an exception that is not a refusal of the verifier.
    """

    reproducer: Reproducer
    failed: str | None
    error: GraphoptError | None
    where: str | None

    @property
    def exit_code(self) -> int:
        return 0 if self.error is None else 1

    @property
    def is_as_recorded(self) -> bool:
        """Whether it is the failure that was recorded; numbers, as in names of nodes, may be others."""
        if self.error is None:
            return False
        kind, message = self.reproducer.error
        return kind == type(self.error).__name__ and _without_numbers(message) == _without_numbers(str(self.error))

    def to_dict(self) -> dict[str, Any]:
        kind, message = self.reproducer.error
        return {
            "pipeline": self.reproducer.pipeline,
            "recorded": {"type": kind, "message": message, "versions": dict(self.reproducer.versions)},
            "passes": self.error is None,
            "as_recorded": self.is_as_recorded,
            "failed": self.failed,
            "error": None if self.error is None else {"type": type(self.error).__name__, "message": str(self.error)},
            "where": self.where,
        }

    def __str__(self) -> str:
        kind, message = self.reproducer.error
        recorded = f"{kind}: {message.partition(chr(10))[0]}"
        if self.error is None:
            return f"{self.reproducer.pipeline} passes now; recorded was {recorded}\n"
        how = "fails as recorded" if self.is_as_recorded else f"fails, but not as recorded ({recorded})"
        line, _, around = str(self.error).partition("\n")
        told = f"{self.failed} {how}: {type(self.error).__name__}: {line}\n"
        return told + (f"{around}\n" if around else "") + (f"in {self.where}\n" if self.where else "")


def replay(folder: Path) -> Replayed:
    """Run the rest of the pipeline on the program in `folder`, with the verifier on.

    Raises GraphoptError, with the nearest valid choice, if the folder is no reproducer, is damaged, or names a pass
    that does not exist any more.
    """
    reproducer = Reproducer.load(folder)
    pipeline = Pipeline.parse(reproducer.pipeline, reproducer.registry())
    pipeline.check(reproducer.program.level, reproducer.done)
    ran: list[str] = []
    try:
        pipeline.run(
            reproducer.program,
            reproducer.context,
            verify=True,
            observer=lambda record, _: ran.append(record.name),
            done=reproducer.done,
        )
    except GraphoptError as error:
        return Replayed(reproducer, format_pass(pipeline.passes[len(ran)]), error, _place(error.__cause__))
    return Replayed(reproducer, None, None, None)


def replay_command(
    folder: Annotated[Path, typer.Argument(help="what the error named: reproduce it with: graphopt-inspect replay …")],
    form: Annotated[Literal["text", "json"], typer.Option("--format", "-f", help="how the answer is written")] = "text",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the file to write; by default the terminal")
    ] = None,
) -> None:
    """Run a pass that failed once more, from the folder that it left; exit code 1 if it still fails."""
    if "" not in sys.path:  # a pass of the user's may be in this folder
        sys.path.insert(0, "")
    replayed = replay(folder)
    write_text(f"{json.dumps(replayed.to_dict(), indent=2)}\n" if form == "json" else str(replayed), output)
    raise typer.Exit(replayed.exit_code)


def message_of(error: GraphoptError) -> str:
    """What to print of an error: its message, with its notes (the folder to reproduce it from) in the first line."""
    first, newline, rest = str(error).partition("\n")
    return "; ".join([first, *getattr(error, "__notes__", [])]) + newline + rest


def _place(cause: BaseException | None) -> str | None:
    """Where an exception was raised, by the innermost line that is graphopt's, or a pass's from elsewhere."""
    if cause is None or isinstance(cause, GraphoptError):
        return None
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if "site-packages" not in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})" if frames else None


def _without_numbers(message: str) -> str:
    return re.sub(r"\d+", "#", message.partition("\n")[0])
