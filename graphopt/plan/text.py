"""Plans as text and files; everything goes through nested plain values."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from graphopt.errors import PlanError
from graphopt.nearest import nearest

AXES = ("dp", "tp", "sp", "cp", "ep", "pp")
MAIN = {"zero": "stage", "precision": "compute", "remat": "policy", "offload": "place", "pipeline": "schedule"}
_WORDS = {"true": True, "false": False, "none": None}
_FILES = (".yaml", ".yml", ".json", ".toml")
_NAME = re.compile(r"[\w.]+")
_COMMA_OUTSIDE_BRACES = re.compile(r",(?![^{}]*\})")


def parse_plan(text: str) -> dict[str, Any]:
    """Nested values of text such as ``dp=4,zero=3,zero.prefetch=2,dynamic=batch,sequence``.

    An axis stands for its size in the mesh, the name of a section for its main field. Raises PlanError for what is no
    ``name=value`` and for a field given twice.
    """
    values: dict[str, Any] = {}
    for name, value in _items(text):
        section, _, key = name.partition(".")
        if name in AXES:
            section, key = "mesh", name
        elif name in MAIN and value is not None:
            key = MAIN[name]
        part = values.setdefault(section, {}) if key else values
        if not isinstance(part, dict) or (key or section) in part:
            raise PlanError(f"plan text gives {name} twice; say {name if section == 'mesh' else section} once")
        part[key or section] = value
    return values


def _items(text: str) -> Iterator[tuple[str, Any]]:
    """Names and values; what follows a comma and is no ``name=`` belongs to the value before it."""
    items: list[str] = []
    for part in filter(str.strip, _COMMA_OUTSIDE_BRACES.split(text)):
        name, equals, _ = part.partition("=")
        if equals and _NAME.fullmatch(name.strip()):
            items.append(part)
        elif items:
            items[-1] += f",{part}"
        else:
            raise PlanError(f"plan text {part.strip()!r} has no '='; write name=value, such as zero=3")
    for item in items:
        name, _, value = item.partition("=")
        yield name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """A word, a whole number, a list (its items stay text, for the field knows what they are), or the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text.startswith("[") and text.endswith("]"):
        return text[1:-1].split("|") if len(text) > 2 else []
    try:
        return int(text)
    except ValueError:
        return text


def format_plan(values: dict[str, Any]) -> str:
    """Text that `parse_plan` turns back into the same plan."""
    items: list[str] = []
    for name, value in values.items():
        if not isinstance(value, dict):
            items.append(f"{name}={_text(value)}")
        elif name == "mesh":
            items += [f"{axis}={size}" for axis, size in value.items()]
        else:
            items += [
                f"{name}{'' if key == MAIN.get(name) else '.' + key}={_text(part)}" for key, part in value.items()
            ]
    return ",".join(items)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        value = [f"{pattern}:{kind}" for pattern, kind in value.items()]
    if isinstance(value, list):
        return f"[{'|'.join(map(str, value))}]"
    return str(value)


def load_plan(path: Path) -> dict[str, Any]:
    """Nested values from a plan file. Raises PlanError for an unknown kind of file or one that does not parse."""
    kind = _kind(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror}") from error
    try:
        values = (
            tomllib.loads(text) if kind == ".toml" else json.loads(text) if kind == ".json" else yaml.safe_load(text)
        )
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"the plan {path} does not parse: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise PlanError(f"the plan {path} holds no fields; write for instance 'zero: 3'")
    return values


def save_plan(values: dict[str, Any], path: Path) -> None:
    """Write nested values in the format that the file's name says."""
    kind = _kind(path)
    if kind == ".toml":
        text = tomli_w.dumps(values)
    elif kind == ".json":
        text = json.dumps(values, indent=2) + "\n"
    else:
        text = yaml.safe_dump(values, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def _kind(path: Path) -> str:
    if path.suffix not in _FILES:
        raise PlanError(f"a plan file named {path.name} is of no known kind; {nearest(path.suffix, _FILES)}")
    return path.suffix
