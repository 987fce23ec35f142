"""Ways to break a correct program, by name: each changes the program it is given, or returns False where it cannot."""

import inspect
from collections.abc import Callable

from graphopt.ir import Program
from tests.mutation.mutators import computing, copying, effects, gathering, reducing, roles, waiting

MUTATORS: dict[str, Callable[[Program], bool]] = {
    name: function
    for module in (waiting, gathering, reducing, computing, copying, effects, roles)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
