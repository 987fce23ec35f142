"""Boxes and arrows of a view, and how they are written as DOT."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import graphviz

from graphopt.inspect.fold import Fold
from graphopt.inspect.recorder import NodeRecord
from graphopt.sizes import readable_size


@dataclass(frozen=True)
class Box:
    """key: what arrows name it by. group: the frame it stands in; marked: drawn to be seen first."""

    key: Hashable
    label: str
    group: str = ""
    marked: bool = False


@dataclass
class Drawing:
    """A title, boxes in order, and arrows (from, to, label) between their keys."""

    title: str
    boxes: list[Box] = field(default_factory=list)
    arrows: list[tuple[Hashable, Hashable, str]] = field(default_factory=list)

    def dot(self) -> str:
        """The drawing in the DOT language of Graphviz, boxes of one group in a frame."""
        number = {box.key: f"n{index}" for index, box in enumerate(self.boxes)}
        graph = graphviz.Digraph(graph_attr={"label": self.title, "labelloc": "t"}, node_attr={"shape": "box"})
        for group in dict.fromkeys(box.group for box in self.boxes):
            members = [box for box in self.boxes if box.group == group]
            if not group:
                _write(graph, members, number)
                continue
            with graph.subgraph(name=f"cluster_{group}", graph_attr={"label": group}) as frame:
                _write(frame, members, number)
        for source, target, label in self.arrows:
            graph.edge(number[source], number[target], label=graphviz.escape(label) if label else None)
        return str(graph.source)


def _write(graph: graphviz.Digraph, boxes: Iterable[Box], number: Mapping[Hashable, str]) -> None:
    for box in boxes:
        style = {"style": "filled", "fillcolor": "gold"} if box.marked else {}
        graph.node(number[box.key], label=graphviz.escape(box.label), **style)


def chain(title: str, boxes: Iterable[Box]) -> Drawing:
    """Boxes one after the other."""
    drawing = Drawing(title, list(boxes))
    pairs = zip(drawing.boxes, drawing.boxes[1:], strict=False)
    drawing.arrows = [(one.key, other.key, "") for one, other in pairs]
    return drawing


def of_nodes(title: str, nodes: Iterable[NodeRecord], marked: Iterable[str] = ()) -> Drawing:
    """A box for each node, an arrow for each value read; nodes of a phase in a frame."""
    drawing, seen = Drawing(title), set(marked)
    for record in nodes:
        group = record.facts.phase.value if record.kind == "call" else f"{record.kind}s"
        label = f"{record.name}\n{record.target}\n{record.value} {record.placement}"
        drawing.boxes.append(Box(record.name, label, group, record.name in seen))
        drawing.arrows += [(source, record.name, "") for source in record.inputs]
    known = {box.key for box in drawing.boxes}
    drawing.arrows = [arrow for arrow in drawing.arrows if arrow[0] in known]
    return drawing


def of_folds(title: str, folds: Iterable[Fold]) -> Drawing:
    """A box for each part of the model, repeated blocks as one; arrows with the bytes that pass between them."""
    drawing = Drawing(title)
    box_of: dict[str, int] = {}
    readers: list[NodeRecord] = []

    def add(part: Fold, nodes: list[NodeRecord], group: str) -> None:
        alike = f"\n{part.alike} alike" if part.alike > 1 else ""
        label = f"{part.path or part.label}{alike}\n{len(nodes)} nodes"
        box_of.update(dict.fromkeys((record.name for record in nodes), len(drawing.boxes)))
        drawing.boxes.append(Box(len(drawing.boxes), label, group))
        readers.extend(nodes)

    def visit(part: Fold, group: str) -> None:
        if not part.is_open:
            add(part, list(part.all_nodes()), group)
            return
        if part.nodes:
            add(part, part.nodes, group)
        for inner in part.folds:
            visit(inner, group)

    for top in folds:
        visit(top, top.label)
    size_of = {record.name: record.bytes for record in readers}
    passed: Counter[tuple[int, int]] = Counter()
    for source, target in {(source, box_of[record.name]) for record in readers for source in record.inputs}:
        if source in box_of and box_of[source] != target:
            passed[box_of[source], target] += size_of[source]
    drawing.arrows = [(one, other, readable_size(size)) for (one, other), size in sorted(passed.items())]
    return drawing
