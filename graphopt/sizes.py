"""Byte sizes as people write them, ``8MiB`` <-> 8388608, and times as they read them."""

import re

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)")


def parse_size(text: str) -> int | None:
    """Bytes that `text` says, without a unit or with one of B, KiB, MiB, GiB, TiB; None if it is no size."""
    text = text.strip()
    match = _SIZE.fullmatch(text)
    if match is None:
        return int(text) if text.isdecimal() else None
    return round(float(match[1]) * _UNITS[match[2]])


def format_size(size: int) -> str:
    """The shortest exact way to write `size` bytes: ``8MiB``, or plain digits where no unit divides it."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def readable_size(size: float) -> str:
    """`size` bytes for a reader, rounded: ``1.5 MiB``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size) >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f} {unit}"
    return f"{size:.0f} B"


def readable_time(seconds: float) -> str:
    """`seconds` for a reader, rounded: ``1.5 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.1f} µs"
