"""The nearest valid choice, for messages."""

import difflib
from collections.abc import Iterable


def nearest(given: str, choices: Iterable[str], prefix: str = "") -> str:
    """``the nearest is 'x'`` if one is close, else ``choose from …``; `prefix` is put before each choice."""
    known = [str(choice) for choice in choices]
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if close:
        return f"the nearest is '{prefix}{close[0]}'"
    return "choose from " + ", ".join(prefix + choice for choice in known) if known else "there is none to choose"
