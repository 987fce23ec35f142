"""What a command line asks for: a target under a plan, on some hardware, and how the answer is to be written."""

import dataclasses
import enum
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from torch import nn

from graphopt.cost.hardware import find_hardware
from graphopt.inspect.document import document
from graphopt.inspect.inspection import Inspection, inspect_model
from graphopt.inspect.page import page
from graphopt.inspect.target import TargetError, load_target
from graphopt.inspect.views.base import View
from graphopt.plan import Plan

_WIDE = 200
_PLAN_FILES = (".yaml", ".yml", ".json", ".toml")


class Format(enum.StrEnum):
    """How a view is written."""

    TEXT = "text"
    JSON = "json"
    DOT = "dot"
    HTML = "html"


@dataclass(frozen=True)
class Request:
    """plan: text or a file. world: ranks; by default the product of the plan's mesh. stage: of a pipeline."""

    target: str
    plan: str
    world: int | None
    hardware: str
    evaluation: bool
    stage: int = 0

    @functools.cached_property
    def resolved(self) -> Plan:
        """The plan for all ranks."""
        plan = Plan.load(self.plan) if Path(self.plan).suffix in _PLAN_FILES else Plan.parse(self.plan)
        return plan.resolve(self.world if self.world is not None else max(1, math.prod(plan.mesh.values())))

    @functools.cached_property
    def call(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The model and its example inputs."""
        return load_target(self.target)

    @functools.cached_property
    def inspection(self) -> Inspection:
        plan, hardware = self.resolved, find_hardware(self.hardware)  # what is wrong with them is said at once
        model, args, kwargs = self.call
        return inspect_model(model, args, kwargs, plan, hardware, evaluation=self.evaluation, stage=self.stage)

    def of_stage(self, stage: int) -> Inspection:
        """Another stage of the same pipeline."""
        return dataclasses.replace(self, stage=stage).inspection

    def under(self, plan: str) -> Inspection:
        """The same model under another plan."""
        return dataclasses.replace(self, plan=plan).inspection


def write(view: View, request: Request, form: Format, output: Path | None) -> None:
    """Write a view to `output`, or print it. Raises TargetError if the file cannot be written."""
    if output is None and form is Format.TEXT and sys.stdout.isatty():
        Console().print(view.text())
    else:
        write_text(_rendered(view, request, form), output)


def write_text(text: str, output: Path | None) -> None:
    """Write `text` to `output`, or print it. Raises TargetError if the file cannot be written."""
    if output is None:
        print(text.rstrip("\n"))
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{output} cannot be written: {error.strerror}") from error
    print(f"{output}: {len(text.encode()):,} bytes")


def _rendered(view: View, request: Request, form: Format) -> str:
    """For a file or another program: wide, plain, and code as it is, so that it can be run."""
    if form is Format.JSON:
        return json.dumps(view.values(), indent=2)
    if form is Format.DOT:
        return view.drawing().dot()
    if form is Format.HTML:
        return page({**document(request.inspection, start=view.anchor), **view.page})
    content = view.text()
    if isinstance(content, Syntax):
        return str(content.code)
    console = Console(width=_WIDE, color_system=None)
    with console.capture() as captured:
        console.print(content)
    return captured.get()
