"""Where a forward graph may be cut into stages, and what crosses each line between two calls."""

import itertools
import operator
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphopt.cost.balance import Lines
from graphopt.cost.duration import compute_seconds
from graphopt.cost.hardware import Hardware
from graphopt.cost.operations import work_of
from graphopt.cost.splitting import requiring_grad
from graphopt.ir import Effect, InputKind, OutputKind, Program, effect_of, is_view
from graphopt.ir.values import byte_size

aten = torch.ops.aten
_BACKWARD = 2  # times the work of forward
# The gradients of what they read take nothing but the gradient of what they give.
_SAVES_NOTHING = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default, aten._to_copy.default, aten.neg.default}
)


class Row:
    """The calls of a forward program in order, as what a pipeline's stages share out among them.

    calls: those that one stage runs. What is made of the batch, of buffers and of constants alone (masks, positions)
    is not among them: each stage that reads it makes it for itself, so it never crosses a line.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        updated = {role.name for role in program.outputs if role.kind is OutputKind.BUFFER}
        self.shared: set[fx.Node] = {
            node
            for role, node in program.nodes_of(InputKind.BATCH, InputKind.BUFFER, InputKind.CONSTANT)
            if not role.requires_grad and role.name not in updated
        }
        for node in program.compute_nodes():
            if effect_of(node) is Effect.PURE and self.shared.issuperset(node.all_input_nodes):
                self.shared.add(node)
        self.calls = [node for node in program.compute_nodes() if node not in self.shared]
        self.tracked = {node for node, _ in requiring_grad(program)}

    @cached_property
    def place(self) -> dict[fx.Node, int]:
        """The number of each call; an item of a list has that of the call that gives the list."""
        found: dict[fx.Node, int] = {}
        for index, node in enumerate(self.calls):
            source = node.args[0] if node.target is operator.getitem else None
            found[node] = found.get(source, index) if isinstance(source, fx.Node) else index
        return found

    @cached_property
    def last_read(self) -> dict[fx.Node, int]:
        """The place of the last call that reads each one."""
        return {
            node: max([self.place[node], *(self.place[user] for user in node.users if user in self.place)])
            for node in self.calls
        }

    def crossing(self, line: int) -> list[fx.Node]:
        """What calls from `line` on read of those before it, in order."""
        return [node for node in self.calls if self.place[node] < line <= self.last_read[node]]

    @cached_property
    def crossing_bytes(self) -> NDArray[np.int64]:
        """[calls + 1]: bytes that cross the line before each call, and behind the last; -1 where a number does."""
        changes = np.zeros((2, len(self.calls) + 2), dtype=np.int64)
        for node in self.calls:
            first, last = self.place[node] + 1, self.last_read[node] + 1
            is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
            changes[:, first] += (byte_size(node.meta["val"]), not is_tensor)
            changes[:, last] -= (byte_size(node.meta["val"]), not is_tensor)
        sizes, others = changes.cumsum(axis=1)[:, : len(self.calls) + 1]
        return np.where(others > 0, -1, sizes)

    @cached_property
    def readers(self) -> list[int]:
        """The places of the calls that read parameters."""
        parameters = self._parameters.keys()
        return [place for place, node in enumerate(self.calls) if not parameters.isdisjoint(node.all_input_nodes)]

    @cached_property
    def narrow(self) -> NDArray[np.int64]:
        """Of the lines between any two calls that read parameters, one behind the other, that over which least goes."""
        found = [self.narrowest(first + 1, last) for first, last in itertools.pairwise(self.readers)]
        return np.array([line for line in found if self.crossing_bytes[line] >= 0], dtype=np.int64)

    def narrowest(self, first: int, last: int) -> int:
        """Of the lines from `first` to `last` that over which least goes; the first of several alike."""
        sizes = self.crossing_bytes[first : last + 1]
        return first + int(np.argmin(np.where(sizes < 0, np.iinfo(np.int64).max, sizes)))

    def seconds(self, hardware: Hardware) -> NDArray[np.float64]:
        """[calls]: what each call takes in a step, its backward included."""
        return np.array(
            [compute_seconds(work_of(node), hardware) * (1 + _BACKWARD * (node in self.tracked)) for node in self.calls]
        )

    def lines(self, hardware: Hardware, state_bytes: dict[str, int]) -> tuple[NDArray[np.int64], Lines]:
        """The places of the lines at which the row may be cut, both ends among them, and what lies before each.

        state_bytes: of each parameter, what a rank holds of it with its gradient and the optimizer's state.
        """
        at = np.concatenate([[0], self.narrow, [len(self.calls)]])
        sums = np.zeros((4, len(self.calls) + 1))
        sums[0, 1:] = self.seconds(hardware)
        known: set[fx.Node] = set()
        for index, node in enumerate(self.calls, start=1):
            for source in node.all_input_nodes:
                name = self._parameters.get(source)
                sums[3, index] += name is not None
                if source not in known:
                    known.add(source)
                    sums[1, index] += state_bytes[name] if name is not None else 0
            sums[2, index] = self._saved(node)
        seconds, state, saved, parameters = sums.cumsum(axis=1)[:, at]
        crossing = self.crossing_bytes[at]
        return at, Lines(
            seconds, state.astype(np.int64), saved.astype(np.int64), parameters.astype(np.int64), crossing
        )

    @cached_property
    def _parameters(self) -> dict[fx.Node, str]:
        return {node: role.name for role, node in self.program.nodes_of(InputKind.PARAMETER)}

    def _saved(self, node: fx.Node) -> int:
        """Bytes of a call's result that backward is likely to read: a call behind it whose gradient takes them does."""
        if is_view(node) or not isinstance(node.meta.get("val"), torch.Tensor):
            return 0
        readers = [user for user in _seen_by(node) if user in self.tracked and user.target not in _SAVES_NOTHING]
        return byte_size(node.meta["val"]) if readers else 0


def _seen_by(node: fx.Node) -> list[fx.Node]:
    """The calls that read a value, by itself or by a view of it."""
    found: list[fx.Node] = []
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if user.op == "call_function":
            (todo.extend(user.users) if is_view(user) else found.append(user))
    return found
