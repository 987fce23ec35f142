"""Errors about what a module is made with."""

from collections.abc import Iterable

from graphopt.nearest import nearest


def check_choice(name: str, given: str, choices: Iterable[str]) -> None:
    """Raises ValueError with the nearest choice for one that there is not."""
    known = list(choices)
    if given not in known:
        raise ValueError(f"{name} is {given!r}; {nearest(given, known)}")


def check_positive(**sizes: int) -> None:
    """Raises ValueError with the name of the first that is below one."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, where at least 1 is needed")
