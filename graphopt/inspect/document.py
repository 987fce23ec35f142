"""An inspection as plain values for JSON: what the page reads. Texts are numbered, what stays the same is said once."""

from collections.abc import Iterable
from typing import Any

from graphopt.cost.simulator import Schedule
from graphopt.inspect.compare import Comparison
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.provenance import Changes
from graphopt.inspect.recorder import NodeRecord, Stage
from graphopt.versions import versions

_MICROSECONDS = 1e6


def document(inspection: Inspection, comparison: Comparison | None = None, start: str = "") -> dict[str, Any]:
    """Everything the views show. start: the view that the page opens at, such as ``memory`` or ``why=mm_3``."""
    strings = _Strings()
    records = _Records(strings)
    report = inspection.report
    stages = [
        _stage(stage, change, records) for stage, change in zip(inspection.stages, inspection.changes, strict=True)
    ]
    return {
        "title": inspection.title,
        "start": start,
        "plan": str(inspection.plan),
        "pipeline": report.pipeline,
        "world": inspection.ranks,
        "mesh": dict(inspection.plan.mesh),
        "versions": versions(),
        "compile_seconds": report.compile_seconds,
        "notes": report.notes,
        "records": records.columns(),
        "stages": stages,
        "repeats": [[strings.number(path) for path in blocks] for blocks in inspection.repeats],
        "why": {
            strings.number(name): [strings.number(sentence) for sentence in sentences]
            for name, sentences in inspection.explanations.items()
        },
        "memory": _memory(inspection, strings),
        "schedule": _schedule(inspection.schedule, inspection, strings),
        "communication": report.communication.to_dict(),
        "memory_table": report.memory.to_dict(),
        "source": report.source,
        "comparison": comparison.to_dict() if comparison is not None else None,
        "strings": strings.texts,
    }


class _Strings:
    """Texts by number; -1 stands for none."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str | None) -> int:
        if text is None:
            return -1
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number

    def numbers(self, texts: Iterable[str]) -> list[int]:
        return [self.number(text) for text in texts]


class _Records:
    """Node records by number, written as columns."""

    def __init__(self, strings: _Strings) -> None:
        self.strings = strings
        self._records: list[NodeRecord] = []
        self._numbers: dict[int, int] = {}

    def number(self, record: NodeRecord) -> int:
        number = self._numbers.setdefault(id(record), len(self._records))
        if number == len(self._records):
            self._records.append(record)
        return number

    def runs(self, records: Iterable[NodeRecord]) -> list[list[int]]:
        """Record numbers as runs (first, count): most nodes stay where they are."""
        found: list[list[int]] = []
        for number in map(self.number, records):
            if found and number == found[-1][0] + found[-1][1]:
                found[-1][1] += 1
            else:
                found.append([number, 1])
        return found

    def columns(self) -> dict[str, list[Any]]:
        text, records = self.strings.number, self._records
        return {
            "name": [text(r.name) for r in records],
            "kind": [text(r.kind) for r in records],
            "target": [text(r.target) for r in records],
            "arguments": [text(r.arguments) for r in records],
            "inputs": [self.strings.numbers(r.inputs) for r in records],
            "value": [text(r.value) for r in records],
            "bytes": [r.bytes for r in records],
            "placement": [text(r.placement) for r in records],
            "phase": [text(r.facts.phase.value) for r in records],
            "module": [text(r.facts.module) for r in records],
            "source": [text(r.facts.source) for r in records],
            "layer": [text(r.facts.layer) for r in records],
            "effect": [text(r.effect) for r in records],
            "made_by": [text(r.facts.made_by) for r in records],
            "origin": [text(r.facts.origin) for r in records],
        }


def _stage(stage: Stage, change: Changes, records: _Records) -> dict[str, Any]:
    strings, made_by = records.strings, stage.made_by
    return {
        "name": stage.name,
        "text": made_by.text,
        "level": stage.level,
        "changed": made_by.changed,
        "seconds": made_by.seconds,
        "statistics": made_by.statistics,
        "order": records.runs(stage.nodes),
        "made": [
            [records.number(record), [strings.number(origin)] if origin is not None else []]
            for record, origin in change.made
        ],
        "changed_nodes": [[records.number(one), records.number(other)] for one, other in change.changed],
        "removed": [[records.number(record), strings.numbers(places)] for record, places in change.removed],
        "moved": strings.numbers(record.name for record in change.moved),
    }


def _memory(inspection: Inspection, strings: _Strings) -> dict[str, Any]:
    memory = inspection.report.memory
    end = len(inspection.program.graph.nodes) - 1
    return {
        "categories": sorted(memory.by_category, key=lambda category: -memory.by_category[category]),
        "changes": memory.steps(),
        "peak_position": memory.peak_position,
        "peak_bytes": memory.peak_bytes,
        "at_peak": [
            [strings.number(life.owner), life.category, life.size, life.first, end if life.last is None else life.last]
            for life in memory.at_peak()
        ],
    }


def _schedule(schedule: Schedule, inspection: Inspection, strings: _Strings) -> dict[str, Any]:
    streams = list(schedule.streams)
    return {
        "hardware": inspection.hardware.name,
        "streams": streams,
        "tasks": [
            [
                strings.number(task.node.name),
                streams.index(task.stream),
                round(task.start * _MICROSECONDS, 3),
                round(task.duration * _MICROSECONDS, 3),
            ]
            for task in schedule.tasks
        ],
        "total_us": schedule.total_seconds * _MICROSECONDS,
        "exposed_us": schedule.exposed_seconds * _MICROSECONDS,
        "ranks": f"each of {inspection.ranks} ranks runs this",
    }
