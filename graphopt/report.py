"""What the compiler did, to read and to compute with."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import fx

from graphopt.cost.communication import Communication
from graphopt.cost.memory import Memory
from graphopt.cost.pipeline_memory import PipelineMemory
from graphopt.passes.pipeline import PassRecord
from graphopt.sizes import readable_size
from graphopt.triton_kernels.used import Use


@dataclass(kw_only=True)
class Report:
    """One compiled call.

    forward_graph, step_graph: the graphs after all passes of their level. pipeline: the passes as text.
    passes: what each pass did. communication, memory: of one step on one rank, predicted from the program.
    compile_seconds: capture, passes and emission. source, source_path: the emitted Python.
    kernels: which variant computes each operator that has a kernel, and why.
    notes: what the compiler fell back to, and why. pipeline_memory: of a rank in a pipeline, of all microbatches of a
    step; the rest is of one microbatch and the rank's first stage.
    """

    forward_graph: fx.GraphModule = field(repr=False)
    step_graph: fx.GraphModule = field(repr=False)
    pipeline: str
    passes: list[PassRecord]
    communication: Communication
    memory: Memory
    compile_seconds: float
    source: str = field(repr=False)
    source_path: Path
    kernels: list[Use] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pipeline_memory: PipelineMemory | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graphs and the source, as plain values for JSON."""
        step = self.pipeline_memory
        return {
            "pipeline": self.pipeline,
            "passes": [vars(record) for record in self.passes],
            "communication": self.communication.to_dict(),
            "memory": self.memory.to_dict(),
            "compile_seconds": self.compile_seconds,
            "source_path": str(self.source_path),
            "kernels": [use._asdict() for use in self.kernels],
            "notes": self.notes,
            **({} if step is None else {"pipeline_memory": step.to_dict()}),
        }

    def print(self) -> None:
        """Print the report to the terminal."""
        Console().print(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.renderables()

    def renderables(self) -> Iterator[Table | str]:
        """What the report prints, part by part."""
        yield passes_table(self.passes)
        yield communication_table(self.communication)
        yield memory_table(self.memory)
        if self.kernels:
            yield kernels_table(self.kernels)
        if self.pipeline_memory is not None:
            step = self.pipeline_memory
            yield f"peak of a rank's step: {readable_size(step.peak_bytes)}, in {step.peak_action} of its schedule"
        yield from self._closing_lines()

    def _closing_lines(self) -> Iterator[str]:
        for note in self.notes:
            yield f"note: {note}"
        yield f"compiled in {self.compile_seconds:.1f} s; source: {self.source_path}"


def passes_table(records: list[PassRecord]) -> Table:
    """One row a pass: what it did, how long it took, what it counted."""
    table = Table("pass", "changed", "seconds", "nodes", "statistics", title="passes", title_justify="left")
    for record in records:
        counts = ", ".join(f"{name} {value}" for name, value in record.statistics.items())
        nodes = f"{record.nodes_before} → {record.nodes_after}"
        table.add_row(record.text, "yes" if record.changed else "no", f"{record.seconds:.2f}", nodes, counts)
    return table


def communication_table(found: Communication) -> Table:
    """One row a kind of collective and axis."""
    title = "communication of a step, sent by each rank"
    table = Table("collective", "axis", "calls", "bytes", title=title, title_justify="left")
    for (kind, axis), calls in found.calls.items():
        table.add_row(kind, axis, str(calls), readable_size(found.bytes[kind, axis]))
    table.add_row("total", "", str(sum(found.calls.values())), readable_size(found.total_bytes))
    return table


def memory_table(found: Memory) -> Table:
    """One row a category, then the peak of all together, then what is elsewhere and not in it."""
    table = Table("memory of a step on one rank", "at most", title="memory", title_justify="left")
    for category, size in sorted(found.by_category.items(), key=lambda item: -item[1]):
        table.add_row(category, readable_size(size))
    table.add_row(f"peak, at {found.peak_node}", readable_size(found.peak_bytes))
    for place, size in found.elsewhere.items():
        table.add_row(f"elsewhere: on {place}", readable_size(size))
    return table


def kernels_table(found: list[Use]) -> Table:
    """One row an operator and variant: how many calls, and why so."""
    table = Table("operator", "calls", "variant", "why", title="kernels", title_justify="left")
    for use in found:
        table.add_row(use.operator, str(use.calls), use.variant, use.why)
    return table
