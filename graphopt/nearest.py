"""The nearest valid choice, and long lists, for messages."""

import difflib
from collections.abc import Iterable

_MOST = 12


def nearest(given: str, choices: Iterable[str], prefix: str = "") -> str:
    """``the nearest is 'x'`` if one is close, else ``choose from …`` the first twelve; `prefix` goes before each."""
    known = [str(choice) for choice in choices]
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if close:
        return f"the nearest is '{prefix}{close[0]}'"
    if not known:
        return "there is none to choose"
    return "choose from " + listed(prefix + choice for choice in known)


def listed(names: Iterable[str]) -> str:
    """The first twelve names, and how many more there are."""
    known = list(names)
    rest = f" and {len(known) - _MOST} more" if len(known) > _MOST else ""
    return ", ".join(known[:_MOST]) + rest
