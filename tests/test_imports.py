"""Imports run downward, floor by floor, and nothing of the folders' bare names reaches `sys.modules`."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"plan", "sizes", "nearest", "errors", "artifacts", "versions", "_torch", "cuda_ext"},
    {"ir", "schedules"},
    {"dimensions"},
    {"runtime", "optim"},
    {"offload", "cost", "capture", "triton_kernels", "experts", "verify"},
    {"passes"},
    {"emit", "report"},
    {"engines"},
    {"lowering"},
    {"driver"},
    {"inspect", "examples", "integrations"},
]
FORBIDDEN = {
    "passes": {"runtime", "emit", "capture", "plan"},
    "ir": {"runtime", "plan"},
    "schedules": {"ir", "plan"},
    "cost": {"runtime", "plan"},
    "verify": {"runtime", "plan", "capture"},
}


def _room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "graphopt" and len(parts) > 1 else None


def _files() -> Iterator[tuple[str, Path]]:
    rooms = ("passes", "cuda_ext", "triton_kernels")
    linked = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    for path in sorted((ROOT / "graphopt").rglob("*.py")) + linked:
        relative = path.relative_to(ROOT)
        inside = relative.parts[1:] if relative.parts[0] == "graphopt" else relative.parts
        if inside[0] != "__init__.py":
            yield inside[0].removesuffix(".py"), path


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _floor(room: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize(("room", "path"), [pytest.param(r, p, id=str(p.relative_to(ROOT))) for r, p in _files()])
def test_imports_run_downward(room: str, path: Path) -> None:
    for module in _imports(path):
        other = _room(module)
        if other is not None and other != room:
            assert _floor(other) <= _floor(room), f"{room} imports {module}, which is above it"
            assert other not in FORBIDDEN.get(room, ()), f"{room} must know nothing of {other}"


@pytest.mark.parametrize(("room", "path"), [pytest.param(r, p, id=str(p.relative_to(ROOT))) for r, p in _files()])
def test_private_torch_names_live_in_one_file(room: str, path: Path) -> None:
    if room != "_torch":
        assert not re.findall(
            r"(?:^|[^.\w])torch(?!\.ops)(?:\.\w+)*\._(?!_)\w*|from torch[.\w]*\._\w+ import", path.read_text()
        )


@pytest.mark.parametrize(("room", "path"), [pytest.param(r, p, id=str(p.relative_to(ROOT))) for r, p in _files()])
def test_triton_is_optional_and_its_private_names_live_in_one_file(room: str, path: Path) -> None:
    if path.name == "_triton.py":
        return
    imported = {module for module in _imports(path) if module.partition(".")[0] == "triton"}
    assert imported <= {"triton", "triton.language"}
    assert not imported or path.name == "kernel.py", "what is imported without triton imports it"


def test_bare_folder_names_are_never_imported() -> None:
    script = (
        "import pkgutil, sys, graphopt\n"
        "for module in pkgutil.walk_packages(graphopt.__path__, 'graphopt.'):\n"
        "    __import__(module.name)\n"
        "assert not {'passes', 'triton_kernels', 'cuda_ext'} & set(sys.modules), 'imported by bare name'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
