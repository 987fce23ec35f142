"""What checks a plan's fields: each raises PlanError with field, value and the nearest valid choice."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from graphopt.errors import PlanError
from graphopt.nearest import nearest
from graphopt.sizes import parse_size

T = TypeVar("T")
_SEPARATORS = frozenset(",:|{}= \t\n")
_POLICIES = ("full", "selective")


class Frozen(Mapping[str, T]):
    """An ordered mapping that does not change, so that a plan can be hashed; the order counts when two are compared."""

    def __init__(self, items: Mapping[str, T] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Frozen):
            return tuple(self._items.items()) == tuple(other._items.items())
        return self._items == other

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def checked_patterns(name: str, given: Any) -> bool | tuple[str, ...]:
    """True, false, or patterns of names, from a list or from one."""
    patterns = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given
    if isinstance(patterns, bool):
        return patterns
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
        raise PlanError(f"{name}={given!r} is neither true, false nor a list of name patterns; say true")
    for pattern in patterns:
        _require_pattern(name, pattern)
    return patterns


def checked_kinds(name: str, given: Any, kinds: tuple[str, ...]) -> Frozen[str]:
    """Pattern -> one of `kinds`, from a mapping, or from a list of ``pattern:kind`` as text has it."""
    if isinstance(given, (list, tuple)) and all(isinstance(item, str) and ":" in item for item in given):
        pairs = [tuple(item.rsplit(":", 1)) for item in given]
    elif isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        raise PlanError(
            f"{name}={given!r} is neither a mapping nor a list of pattern:kind; write for instance "
            f"{{'*.q_proj': '{kinds[0]}'}}"
        )
    found: dict[str, str] = {}
    for pattern, kind in pairs:
        _require_pattern(name, pattern)
        require_choice(f"{name}[{pattern}]", kind, kinds)
        if found.setdefault(pattern, kind) != kind:
            raise PlanError(f"{name} says both {found[pattern]} and {kind} of {pattern!r}; say one")
    return Frozen(found)


def _require_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern or _SEPARATORS & set(pattern):
        raise PlanError(f"{name} has a pattern {pattern!r} that matches no name; write one such as 'layers.0.*'")


def checked_policy(given: Any) -> str | int | float:
    """Of rematerialization: a word, bytes, or a share."""
    value: Any = given
    if isinstance(given, str) and given not in _POLICIES:
        value = parse_size(given)
        if value is None:
            try:
                value = float(given)
            except ValueError:
                words = ", ".join(_POLICIES)
                raise PlanError(
                    f"remat.policy={given!r} is not one of {words}, nor a budget such as 8GiB or 0.5; "
                    f"{nearest(given, _POLICIES)}"
                ) from None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise PlanError(f"remat.policy={given!r} is neither a word nor a budget; say 'selective', '8GiB' or 0.5")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise PlanError(f"remat.policy={given!r} is no share; the nearest is {min(max(value, 0.0), 1.0)}")
    if type(value) is int:
        require_int("remat.policy", value, 1)
    checked: str | int | float = value
    return checked


def checked_bytes(name: str, given: Any, low: int) -> int:
    """Bytes from a number, or from text such as ``8MiB``."""
    size = parse_size(given) if isinstance(given, str) else given
    if size is None:
        raise PlanError(f"{name}={given!r} is not a size; write bytes, or B, KiB, MiB, GiB or TiB, as in 8MiB")
    require_int(name, size, low)
    return int(size)


def require_bool(name: str, value: Any) -> None:
    """Raises PlanError for anything but true and false."""
    if not isinstance(value, bool):
        raise PlanError(f"{name}={value!r} is not a truth value; say true or false")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises PlanError for what is none of `choices`."""
    if value not in choices:
        raise PlanError(f"{name}={value!r} is not one of {', '.join(choices)}; {nearest(str(value), choices)}")


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises PlanError for what is no whole number from `low` to `high`."""
    if type(value) is not int:
        raise PlanError(
            f"{name}={value!r} is not a whole number; the nearest valid choice is {_nearest_int(value, low, high)}"
        )
    if value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise PlanError(
            f"{name}={value} is out of range ({allowed}); the nearest valid choice is {_nearest_int(value, low, high)}"
        )


def _nearest_int(value: Any, low: int, high: int | None) -> int:
    try:
        number = round(float(value))
    except (TypeError, ValueError, OverflowError):
        return low
    return max(low, number if high is None else min(number, high))
