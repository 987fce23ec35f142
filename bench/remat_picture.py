"""Peaks beside budgets as a picture (SVG)."""

from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

_WIDTH, _HEIGHT, _MARGIN, _LINE = 640, 320, 60, 18
_COLOURS = {"graphopt": "#0072b2", "torch": "#d55e00", "budget": "#7f7f7f"}  # of Okabe and Ito (2008)
_LABELS = {
    "graphopt": "graphopt, measured peak",
    "torch": "torch.compile with activation_memory_budget, measured peak",
    "budget": "graphopt's budget",
}


def picture(points: dict[str, list[dict[str, Any]]]) -> str:
    """SVG text. points: of `bench.remat_sweep.sweep`, for ``graphopt`` and ``torch``."""
    curves = {name: [(p["share"], p["peak_bytes"]) for p in points[name]] for name in ("torch", "graphopt")}
    curves = {"budget": [(p["share"], p["limit_bytes"]) for p in points["graphopt"]], **curves}
    top = max(size for curve in curves.values() for _, size in curve)
    size = f"0 0 {_WIDTH + 2 * _MARGIN} {_HEIGHT + 2 * _MARGIN + 3 * _LINE}"
    svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=size)
    svg.set("font-family", "sans-serif")
    svg.set("font-size", "12")
    ElementTree.SubElement(svg, "title").text = "Peaks of a step as its budget falls"
    _axes(svg, top)
    for place, (name, curve) in enumerate(curves.items()):
        _curve(svg, name, ((_x(share), _y(peak, top)) for share, peak in curve))
        y = _MARGIN + _HEIGHT + (3 + place) * _LINE
        _text(svg, _MARGIN, y, _LABELS[name], fill=_COLOURS[name])
    return ElementTree.tostring(svg, encoding="unicode")


def _x(share: float) -> float:
    return _MARGIN + (1 - share) * _WIDTH


def _y(size: float, top: float) -> float:
    return _MARGIN + _HEIGHT * (1 - size / top)


def _axes(svg: ElementTree.Element, top: int) -> None:
    """Shares from no budget to the least, and megabytes."""
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        _text(svg, _x(share), _MARGIN + _HEIGHT + _LINE, f"{share:g}", **{"text-anchor": "middle"})
    _text(svg, _x(0.5), _MARGIN + _HEIGHT + 2 * _LINE, "share of the budget, falling", **{"text-anchor": "middle"})
    for size in (0, top / 2, top):
        y = _y(size, top)
        ElementTree.SubElement(
            svg, "line", x1=str(_MARGIN), x2=str(_MARGIN + _WIDTH), y1=f"{y:.1f}", y2=f"{y:.1f}", stroke="#dddddd"
        )
        _text(svg, _MARGIN - 6, y + 4, f"{size / 1e6:.1f} MB", **{"text-anchor": "end"})


def _curve(svg: ElementTree.Element, name: str, points: Iterable[tuple[float, float]]) -> None:
    corners = list(points)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    style = {"fill": "none", "stroke": _COLOURS[name], "stroke-width": "2"}
    if name == "budget":
        style["stroke-dasharray"] = "4 3"
    ElementTree.SubElement(svg, "polyline", points=line, **style)
    if name != "budget":
        for x, y in corners:
            ElementTree.SubElement(svg, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3", fill=_COLOURS[name])


def _text(svg: ElementTree.Element, x: float, y: float, text: str, **style: str) -> None:
    ElementTree.SubElement(svg, "text", x=f"{x:.1f}", y=f"{y:.1f}", **style).text = text
