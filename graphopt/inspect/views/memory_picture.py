"""The timeline of memory as a picture (SVG): what is alive at each node of a step, one kind on top of the other."""

from pathlib import Path
from xml.etree import ElementTree

from graphopt.cost.memory import Memory
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.target import TargetError
from graphopt.sizes import readable_size

_WIDTH, _HEIGHT, _MARGIN, _LINE = 960, 360, 40, 18
# From what stays throughout, at the foot, to what comes and goes; colours of Okabe and Ito (2008), seen apart by all.
_COLOURS = {
    "parameters": "#0072b2",
    "optimizer": "#004466",
    "buffers": "#7f7f7f",
    "batch": "#bcbcbc",
    "segments": "#8c6d31",
    "communication": "#cc79a7",
    "gathered": "#56b4e9",
    "host": "#332288",
    "gradients": "#d55e00",
    "outputs": "#f0e442",
    "activations": "#009e73",
    "temporaries": "#e69f00",
}


def write_picture(memory: Memory, inspection: Inspection, path: Path) -> None:
    """The timeline of an inspected program as an SVG file. Raises TargetError if it cannot be written."""
    try:
        path.write_text(picture(memory, len(inspection.program.graph.nodes)), encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error.strerror}") from error


def picture(memory: Memory, nodes: int) -> str:
    """The timeline of a step of so many nodes as SVG text."""
    bottom = _MARGIN + _HEIGHT
    width, height = _WIDTH + 2 * _MARGIN, bottom + _MARGIN + _LINE
    svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}")
    svg.set("font-family", "sans-serif")
    svg.set("font-size", "12")
    elsewhere = "".join(f", and {readable_size(size)} on {place}" for place, size in memory.elsewhere.items())
    title = f"peak {readable_size(memory.peak_bytes)} at {memory.peak_node}{elsewhere}"
    ElementTree.SubElement(svg, "title").text = title
    below = [0] * nodes
    for place, category in enumerate(c for c in _COLOURS if c in memory.by_category):
        above = [low + size for low, size in zip(below, _alive(memory, category, nodes), strict=True)]
        outline = [*_corners(above, memory), *reversed(_corners(below, memory))]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        area = ElementTree.SubElement(svg, "polygon", points=points, fill=_COLOURS[category])
        ElementTree.SubElement(area, "title").text = category
        _legend(svg, place, category, bottom + _LINE)
        below = above
    x = _MARGIN + (memory.peak_position + 0.5) / nodes * _WIDTH
    ElementTree.SubElement(
        svg, "line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=str(_MARGIN), y2=str(bottom), stroke="black"
    ).set("stroke-dasharray", "4 3")
    anchor = {"text-anchor": "end" if x > width / 2 else "start"}
    ElementTree.SubElement(svg, "text", {"x": f"{x:.1f}", "y": str(_MARGIN - 8), **anchor}).text = title
    return ElementTree.tostring(svg, encoding="unicode")


def _alive(memory: Memory, category: str, nodes: int) -> list[int]:
    """Bytes of a category at each node."""
    changes = dict(memory.steps()[category])
    found, now = [], 0
    for position in range(nodes):
        now = changes.get(position, now)
        found.append(now)
    return found


def _corners(sizes: list[int], memory: Memory) -> list[tuple[float, float]]:
    """The line over `sizes`, level over each node; only where it changes has it points."""
    corners: list[tuple[float, float]] = []
    for position, size in enumerate(sizes):
        if position and size == sizes[position - 1]:
            continue
        x = _MARGIN + position / len(sizes) * _WIDTH
        y = _MARGIN + _HEIGHT * (1 - size / memory.peak_bytes)
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    return [*corners, (_MARGIN + _WIDTH, corners[-1][1])]


def _legend(svg: ElementTree.Element, place: int, category: str, y: int) -> None:
    x = _MARGIN + place % 6 * 160
    y += place // 6 * _LINE
    ElementTree.SubElement(svg, "rect", x=str(x), y=str(y - 10), width="10", height="10", fill=_COLOURS[category])
    ElementTree.SubElement(svg, "text", x=str(x + 15), y=str(y)).text = category
