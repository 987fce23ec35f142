"""Whether every node gives what is stated of it, by running on fake tensors what is new.

What an operator gives follows from the types of its arguments: repeated layers, and passes that leave a node alone,
cost a look into a table.
"""

from typing import Any

import torch
from torch import fx

from graphopt._torch import FakeTensorMode, without_guards
from graphopt.errors import VerificationError
from graphopt.ir.program import Program
from graphopt.ir.values import described
from graphopt.verify.surroundings import surroundings

Type = tuple[Any, ...]


class ValueChecker:
    """Remembers what calls of each type give."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._results: dict[Type, Type] = {}

    def check(self, program: Program) -> None:
        """Raises VerificationError for a node that cannot run, or gives another shape, dtype or device."""
        types: dict[fx.Node, Type] = {}
        for node in program.graph.nodes:
            if node.op == "output":
                continue
            types[node] = _type(node.meta.get("val"))
            if node.op == "call_function":
                self._check(node, types)

    def _check(self, node: fx.Node, types: dict[fx.Node, Type]) -> None:
        call = (node.target, _signature(node.args, types), _signature(node.kwargs, types))
        if call not in self._results:
            self._results[call] = _without_strides(_type(self._run(node)))
        if _without_strides(types[node]) != self._results[call]:
            _compare(node, node.meta.get("val"), self._run(node))

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        try:
            with self._fake_mode, without_guards(self._fake_mode), torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise VerificationError(f"{node.name} cannot run: {error}\n{surroundings(node)}") from error


def _compare(node: fx.Node, stated: Any, found: Any) -> None:
    """Where an operator looked at a symbol, it gives the size that the symbol has in the example."""
    if _of_example(stated) != _of_example(found):
        where = "" if described(found) != described(stated) else " on another device"
        raise VerificationError(
            f"{node.name} is stated to be {described(stated)} but is {described(found)}{where}\n{surroundings(node)}"
        )


def _of_example(value: Any) -> Type:
    """Dtype, device and shape, with the sizes that symbols have in the example."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, *map(_of_example, value.shape))
    if isinstance(value, (int, torch.SymInt)):
        return ("size", value if isinstance(value, int) else value.node.hint)
    if isinstance(value, (list, tuple)):
        return ("list", *map(_of_example, value))
    return ("value", type(value))


def _type(value: Any) -> Type:
    """Dtype, device, shape and strides of a tensor, or of each in a list; symbols by their expression."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, _sizes(value.shape), _sizes(value.stride()))
    if isinstance(value, (list, tuple)):
        return ("list", *map(_type, value))
    return ("value", type(value))


def _without_strides(kind: Type) -> Type:
    if kind[0] == "list":
        return ("list", *map(_without_strides, kind[1:]))
    return kind[:3]


def _sizes(sizes: Any) -> tuple[str, ...]:
    """As expressions: a symbol that has become a number equals it."""
    return tuple(map(str, sizes))


def _signature(value: Any, types: dict[fx.Node, Type]) -> Any:
    """Arguments of a call, each value by its type; what is written into the call as it is."""
    if isinstance(value, fx.Node):
        kind = types[value]
        return kind if kind[0] != "value" else (kind, str(value.meta.get("val")))
    if isinstance(value, (list, tuple)):
        return ("list", *(_signature(item, types) for item in value))
    if isinstance(value, dict):
        return ("dict", *((name, _signature(item, types)) for name, item in value.items()))
    if isinstance(value, slice):
        return ("slice", _signature((value.start, value.stop, value.step), types))
    return (type(value), repr(value))
