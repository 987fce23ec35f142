"""Crash reproducers: a pass that fails leaves a folder with all it takes to see it fail again.

program.json        the program before the pass, exact
program.txt         the same, for the reader
reproducer.json     the rest of the pipeline, what the passes may know besides the program, versions, the error
error.txt           the error with its traceback
"""

import contextlib
import dataclasses
import importlib
import json
import platform
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt._torch import new_fake_mode
from graphopt.artifacts import artifact_directory, write_folder
from graphopt.cost.hardware import Hardware
from graphopt.errors import GraphoptError, PassError
from graphopt.ir import ParameterLayout, Program, Split
from graphopt.ir.printer import format_program
from graphopt.ir.serialize import from_dict, to_dict
from graphopt.ir.serialize_values import named
from graphopt.ir.snapshot import Snapshot
from graphopt.nearest import nearest
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass, PassContext
from graphopt.versions import versions

_FORMAT = 2
_DATA, _PROGRAM = "reproducer.json", "program.json"


class ReproducerError(GraphoptError):
    """A folder that is no reproducer, or one that this graphopt cannot run."""


@dataclass(frozen=True)
class Reproducer:
    """A failure of a pass, and what it takes to see it again.

    program: before the pass; its values, and `context`, are of a fake mode of their own.
    pipeline: text of what was left to run, the failing pass first; done: names of the passes that had run.
    places: name -> ``module:qualname`` of each pass left to run.
    versions: of what was running. error: type and message, as the caller saw them.
    """

    program: Program
    context: PassContext
    pipeline: str
    done: tuple[str, ...]
    places: Mapping[str, str]
    versions: Mapping[str, str]
    error: tuple[str, str]

    @classmethod
    def load(cls, folder: Path) -> "Reproducer":
        """What a failing pass left in `folder`. Raises ReproducerError with the nearest valid choice."""
        data, program = _read(folder, _DATA), _read(folder, _PROGRAM)
        fake_mode = new_fake_mode()
        try:
            if data["format"] != _FORMAT:
                raise ReproducerError(f"{folder} is of format {data['format']}; this graphopt reads {_FORMAT}")
            return cls(
                program=from_dict(program, fake_mode),
                context=PassContext(fake_mode=fake_mode, **_read_context(data["context"])),
                pipeline=data["pipeline"],
                done=tuple(data["done"]),
                places=data["places"],
                versions=data["versions"],
                error=(data["error"]["type"], data["error"]["message"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReproducerError(
                f"{folder} is damaged ({type(error).__name__}: {error}); have the pass fail again to write it anew"
            ) from error

    def registry(self) -> dict[str, type[Pass]]:
        """The built-in passes and those, from elsewhere, that were left to run. Raises ReproducerError."""
        outside = {name: place for name, place in self.places.items() if place != _place(REGISTRY.get(name))}
        return {**REGISTRY, **{name: _pass_at(name, place) for name, place in outside.items()}}


@contextlib.contextmanager
def reproducible(
    program: Program, context: PassContext, remaining: Sequence[Pass], pipeline: str, done: Sequence[str]
) -> Iterator[None]:
    """A failure inside leaves a reproducer of `program` as it is now, and says so in a note.

    remaining: the passes left to run, the one that runs now first; pipeline: their text; done: names of those before.
    An error that is not one of graphopt's is raised as PassError, with itself as the cause.
    """
    snapshot, context = Snapshot(program), dataclasses.replace(context, layouts=dict(context.layouts))

    def leave(failure: GraphoptError) -> None:
        try:
            folder = _written(snapshot.restored(), context, remaining, pipeline, done, failure)
            failure.add_note(f"reproduce it with: graphopt-inspect replay {folder}")
        except Exception as second:  # told, but it must not hide the failure itself
            failure.add_note(f"no reproducer could be written: {type(second).__name__}: {second}")

    try:
        yield
    except GraphoptError as error:
        leave(error)
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        failure = PassError(f"{remaining[0].name} failed: {type(error).__name__}: {reason}")
        failure.__cause__ = error
        leave(failure)
        raise failure from error


def _written(
    program: Program,
    context: PassContext,
    remaining: Sequence[Pass],
    pipeline: str,
    done: Sequence[str],
    error: GraphoptError,
) -> Path:
    data = {
        "format": _FORMAT,
        "pipeline": pipeline,
        "done": list(done),
        "places": {step.name: _place(type(step)) for step in remaining},
        "context": _written_context(context),
        "versions": {**versions(), "platform": platform.platform()},
        "error": {"type": type(error).__name__, "message": str(error)},
    }
    files = {
        _DATA: json.dumps(data, indent=1),
        _PROGRAM: json.dumps(to_dict(program), indent=1),
        "program.txt": format_program(program),
        "error.txt": "".join(traceback.format_exception(error)),
    }
    return write_folder(f"reproducer_{remaining[0].name}", files, identity=files[_DATA] + files[_PROGRAM])


def _written_context(context: PassContext) -> dict[str, Any]:
    return {
        "mesh": dict(context.mesh),
        "layouts": _written_layouts(context.layouts),
        "decided": _written_layouts(context.decided) if context.decided is not None else None,
        "data_axis": context.data_axis,
        "gradient_outputs": sorted(context.gradient_outputs),
        "reduce_gradients": context.reduce_gradients,
        "reduce_dtype": _name(context.reduce_dtype) if context.reduce_dtype is not None else None,
        "hardware": context.hardware.to_dict(),
        "shared_axes": sorted(context.shared_axes),
        "kernels": context.kernels,
    }


def _read_context(written: dict[str, Any]) -> dict[str, Any]:
    return {
        "mesh": written["mesh"],
        "layouts": _read_layouts(written["layouts"]),
        "decided": _read_layouts(written["decided"]) if written["decided"] is not None else None,
        "data_axis": written["data_axis"],
        "gradient_outputs": frozenset(written["gradient_outputs"]),
        "reduce_gradients": written["reduce_gradients"],
        "reduce_dtype": named(written["reduce_dtype"]) if written["reduce_dtype"] is not None else None,
        "hardware": Hardware.from_dict(written["hardware"]),
        "shared_axes": frozenset(written["shared_axes"]),
        "kernels": written.get("kernels"),
    }


def _written_layouts(layouts: Mapping[str, ParameterLayout]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(layout) | {"dtype": _name(layout.dtype)} for layout in layouts.values()]


def _read_layouts(written: list[dict[str, Any]]) -> dict[str, ParameterLayout]:
    found = {}
    for fields in written:
        splits = tuple(Split(**split) for split in fields["splits"])
        read = {"shape": tuple(fields["shape"]), "dtype": named(fields["dtype"]), "splits": splits}
        read["stages"] = tuple(fields["stages"])
        found[fields["name"]] = ParameterLayout(**{**fields, **read})
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(kind: type[Pass] | None) -> str:
    return f"{kind.__module__}:{kind.__qualname__}" if kind is not None else ""


def _pass_at(name: str, place: str) -> type[Pass]:
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, ValueError, AttributeError) as error:
        raise ReproducerError(
            f"the pass {name!r} was {place}, which is not there: {error}; {nearest(name, REGISTRY)}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise ReproducerError(f"the pass {name!r} was {place}, which is no pass now; {nearest(name, REGISTRY)}")
    return found


def _read(folder: Path, name: str) -> Any:
    if not folder.is_dir():
        known = [str(path.parent) for home in (folder.parent, artifact_directory()) for path in home.glob(f"*/{_DATA}")]
        raise ReproducerError(f"there is no folder {folder}; {nearest(str(folder), dict.fromkeys(known))}")
    path = folder / name
    if not path.is_file():
        files = sorted(each.name for each in folder.iterdir())
        raise ReproducerError(f"{folder} is no reproducer, it has no {name}; {nearest(name, files)}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReproducerError(f"{path} is damaged: {error}; have the pass fail again to write it anew") from error
