"""What a view is: one question about a compilation, answered as text, values, drawing or page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType

from graphopt.inspect.drawing import Drawing


@dataclass(frozen=True)
class View:
    """Each form is made when it is asked for.

    text: for a terminal. values: plain ones, for JSON. drawing: for DOT. anchor: where the page opens; page: what the
    page shows beside the compilation. failed: whether the answer is bad news, which the exit code says.
    """

    text: Callable[[], RenderableType]
    values: Callable[[], Any]
    drawing: Callable[[], Drawing]
    anchor: str
    page: Mapping[str, Any] = field(default_factory=dict)
    failed: bool = False
