"""The program after a pass, folded or whole, and what the pass changed."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from graphopt.inspect.drawing import Drawing, of_folds, of_nodes
from graphopt.inspect.fold import Fold, fold
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.provenance import Changes
from graphopt.inspect.recorder import NodeRecord, Stage
from graphopt.inspect.views.base import View
from graphopt.sizes import readable_size


def graph(inspection: Inspection, stage: int, unfold: str | None, search: str | None) -> View:
    """The program of a stage.

    unfold: pattern of module paths to unfold (as in fnmatch, ``*`` for all); search: text that a node's name, operator,
    module or pass contains; the nodes found are shown in order of execution.
    """
    chosen = inspection.stages[stage]
    nodes = chosen.nodes if search is None else [record for record in chosen.nodes if _matches(record, search)]
    title = f"{inspection.title} after {chosen.made_by.text}"

    def text() -> RenderableType:
        if search is not None:
            return Group(*map(node_line, nodes), Text(f"{len(nodes)} nodes match {search!r}"))
        tree = Tree(f"{title}, {len(nodes)} nodes")
        for top in fold(nodes, inspection.repeats):
            _grow(tree, top, unfold)
        return tree

    def values() -> dict[str, Any]:
        return {"after": chosen.name, "level": chosen.level, "nodes": [node_values(record) for record in nodes]}

    def drawing() -> Drawing:
        is_whole = search is not None or unfold == "*"
        return of_nodes(title, nodes) if is_whole else of_folds(title, fold(nodes, inspection.repeats))

    return View(text, values, drawing, f"graph={stage}")


def diff(inspection: Inspection, stage: int) -> View:
    """What the pass that left a stage changed, and what each node it made or removed stems from or gave way to."""
    chosen, found = inspection.stages[stage], inspection.changes[stage]
    title = f"what {chosen.made_by.text} changed in {inspection.title}"

    def text() -> RenderableType:
        counts = ", ".join(f"{kind} {count}" for kind, count in found.counts.items())
        return Group(Text(f"{title}: {counts}"), *_rows(chosen, found))

    def values() -> dict[str, Any]:
        return {
            "pass": chosen.name,
            "made": [{**node_values(record), "from": origin} for record, origin in found.made],
            "changed": [{"before": node_values(a), "after": node_values(b)} for a, b in found.changed],
            "removed": [{**node_values(record), "in its place": places} for record, places in found.removed],
            "moved": [record.name for record in found.moved],
        }

    def drawing() -> Drawing:
        touched = [record for record, _ in found.made] + [record for _, record in found.changed] + found.moved
        names = {record.name for record in touched}
        near = [r for r in chosen.nodes if r.name in names or names.intersection(r.inputs)]
        return of_nodes(title, near, marked=names)

    return View(text, values, drawing, f"diff={stage}")


def node_line(record: NodeRecord) -> Text:
    """One node for a terminal: name, value, call, then how it lies, its bytes and where it comes from."""
    facts = record.facts
    place = [record.placement, readable_size(record.bytes), facts.module, facts.source, f"by {facts.made_by}"]
    return Text.assemble(str(record), ("  # " + ", ".join(filter(None, place)), "dim"))


def node_values(record: NodeRecord) -> dict[str, Any]:
    """One node as plain values."""
    facts = record.facts
    return {
        "name": record.name,
        "kind": record.kind,
        "target": record.target,
        "arguments": record.arguments,
        "inputs": list(record.inputs),
        "value": record.value,
        "bytes": record.bytes,
        "placement": record.placement,
        "effect": record.effect,
        "phase": facts.phase.value,
        "module": facts.module,
        "source": facts.source,
        "layer": facts.layer,
        "made_by": facts.made_by,
        "origin": facts.origin,
        "reasons": list(facts.reasons),
    }


def _matches(record: NodeRecord, text: str) -> bool:
    facts = record.facts
    return any(text in each for each in (record.name, record.target, facts.module, facts.made_by))


def _grow(tree: Tree, part: Fold, unfold: str | None) -> None:
    """Add a part: unfolded to its nodes if its path fits; the list of modules is always open."""
    nodes = list(part.inside())
    alike = f", {part.alike} alike" if part.alike > 1 else ""
    made = sorted({record.facts.made_by for record in nodes} - {"capture", "differentiate"})
    by = f", also by {', '.join(made)}" if made else ""
    branch = tree.add(f"{part.label}  [dim]{len(nodes)} nodes{alike}{by}[/dim]", highlight=False)
    if unfold is not None and fnmatch.fnmatchcase(part.path or part.label, unfold):
        for record in part.nodes:
            branch.add(node_line(record))
    for inner in part.folds:
        _grow(branch, inner, unfold)


def _rows(stage: Stage, found: Changes) -> Sequence[Text]:
    """Made and changed nodes and those that moved in the order of the program, then those that are gone."""
    origins = {record.name: origin for record, origin in found.made}
    changed = {after.name: before for before, after in found.changed}
    moved = {record.name for record in found.moved}
    rows = []
    for index, record in enumerate(stage.nodes):
        after = f", now after {stage.nodes[index - 1].name}" if record.name in moved and index else ""
        if record.name in origins:
            origin = origins[record.name]
            rows.append(Text(f"+ {record}" + (f"  # from {origin}" if origin else ""), "green"))
        elif record.name in changed:
            rows.append(Text(f"~ {changed[record.name]}\n  → {record}{after}", "yellow"))
        elif after:
            rows.append(Text(f"> {record}  # moved{after}", "cyan"))
    for record, places in found.removed:
        rows.append(Text(f"- {record}" + (f"  # in its place {', '.join(places[:3])}" if places else ""), "red"))
    return rows
