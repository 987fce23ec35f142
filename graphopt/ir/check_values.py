"""Whether every node gives what is stated of it, by running on fake tensors what is new since the last time."""

from typing import Any

import torch
from torch import fx

from graphopt._torch import FakeTensorMode
from graphopt.errors import VerificationError
from graphopt.ir.program import Program
from graphopt.ir.surroundings import surroundings
from graphopt.ir.values import described

_Call = tuple[Any, Any, Any, Any, list[Any]]


class ValueChecker:
    """Remembers which calls gave what is stated; a call is run again when it, or an input's value, is another."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._checked: dict[fx.Node, _Call] = {}

    def check(self, program: Program) -> None:
        """Raises VerificationError for a node that cannot run, or gives another shape, dtype or device."""
        checked: dict[fx.Node, _Call] = {}
        with self._fake_mode, torch.no_grad():
            for node in program.graph.nodes:
                if node.op != "call_function":
                    continue
                values = [source.meta.get("val") for source in node.all_input_nodes]
                call = (node.target, node.args, node.kwargs, node.meta.get("val"), values)
                if not _is_same(call, self._checked.get(node)):
                    _run(node)
                checked[node] = call
        self._checked = checked


def _is_same(call: _Call, known: _Call | None) -> bool:
    """Whether a call was checked: the same operator on the same arguments, and the very same values."""
    if known is None or call[0] is not known[0] or call[3] is not known[3] or len(call[4]) != len(known[4]):
        return False
    return all(a is b for a, b in zip(call[4], known[4], strict=True)) and call[1:3] == known[1:3]


def _run(node: fx.Node) -> None:
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise VerificationError(f"{node.name} cannot run: {error}\n{surroundings(node)}") from error
    _compare(node, node.meta.get("val"), found)


def _compare(node: fx.Node, stated: Any, found: Any) -> None:
    if isinstance(found, (list, tuple)):
        if not isinstance(stated, (list, tuple)) or len(stated) != len(found):
            raise VerificationError(
                f"{node.name} is stated to be {described(stated)} but is {described(found)}\n{surroundings(node)}"
            )
        for one, other in zip(stated, found, strict=True):
            _compare(node, one, other)
    elif isinstance(found, torch.Tensor):
        right = isinstance(stated, torch.Tensor) and stated.dtype == found.dtype and stated.device == found.device
        if not right or list(map(str, stated.shape)) != list(map(str, found.shape)):
            shown = [f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else str(t) for t in (stated, found)]
            raise VerificationError(f"{node.name} is stated to be {shown[0]} but is {shown[1]}\n{surroundings(node)}")
