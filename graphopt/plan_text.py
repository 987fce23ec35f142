"""Plans as text and files; everything goes through nested plain values."""

import json
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from graphopt.errors import PlanError
from graphopt.nearest import nearest
from graphopt.sizes import format_size, parse_size

_AXES = ("dp",)
_WORDS = {"true": True, "false": False, "none": None}
_MAIN = {"zero": "stage", "precision": "compute"}
_FILES = (".yaml", ".yml", ".json", ".toml")


def parse_plan(text: str) -> dict[str, Any]:
    """Nested values of text such as ``dp=4,zero=3,zero.prefetch=2``; passes stand last and may hold commas."""
    values: dict[str, Any] = {}
    text, separator, passes = text.partition("passes=")
    if separator:
        values["passes"] = passes
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if not equals:
            raise PlanError(f"plan text {item!r} has no '='; write name=value, such as zero=3")
        _put(values, name.strip(), value.strip())
    return values


def _put(values: dict[str, Any], name: str, text: str) -> None:
    if name in _AXES:
        values.setdefault("mesh", {})[name] = _value(text)
        return
    section, dot, key = name.partition(".")
    if not dot:
        if section in _MAIN:
            values[section] = {**values.get(section, {}), _MAIN[section]: _value(text)}
        else:
            values[section] = _value(text.replace("+", ",")) if section == "dynamic" else _value(text)
        return
    part = values.setdefault(section, {})
    if not isinstance(part, dict):
        raise PlanError(f"plan text gives {section} both a value and a field {name}")
    part[key] = _value(text)


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text.startswith("[") and text.endswith("]"):
        return tuple(_value(part) for part in text[1:-1].split("|") if part)
    try:
        return int(text)
    except ValueError:
        size = parse_size(text)
        return text if size is None else size


def format_plan(values: dict[str, Any]) -> str:
    """Text that `parse_plan` turns back into `values`."""
    items: list[str] = []
    for name, value in values.items():
        if name == "mesh":
            items += [f"{axis}={size}" for axis, size in value.items()]
        elif isinstance(value, dict):
            main = _MAIN.get(name)
            if main in value:
                items.append(f"{name}={_text(main, value[main])}")
            items += [f"{name}.{key}={_text(key, item)}" for key, item in value.items() if key != main]
        elif name != "passes":
            items.append(f"{name}={_text(name, value)}")
    if "passes" in values:
        items.append(f"passes={values['passes']}")
    return ",".join(items)


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{'|'.join(_text(name, item) for item in value)}]"
    if isinstance(value, int):
        return format_size(value) if name.endswith(("bytes", "_below")) else str(value)
    return str(value).replace(",", "+")


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
