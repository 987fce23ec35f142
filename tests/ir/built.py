"""Programs built by hand, run with real tensors."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphopt._torch import new_fake_mode
from graphopt.ir import Input, InputKind, Level, Output, OutputKind, Program

functional = torch.ops._c10d_functional


class Hand:
    """Builds a step program call by call; values are fake tensors of a mode of its own."""

    def __init__(self) -> None:
        self.mode = new_fake_mode()
        self.graph = fx.Graph()
        self.roles: list[Input] = []

    def input(self, *shape: int, kind: InputKind = InputKind.BATCH, name: str = "") -> fx.Node:
        self.roles.append(Input(kind, name or f"x{len(self.roles)}"))
        node = self.graph.placeholder(self.roles[-1].identifier)
        with self.mode:
            node.meta["val"] = torch.empty(shape)
        return node

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def waited(self, launched: fx.Node, index: int) -> fx.Node:
        """Item `index` of a coalesced collective, waited for."""
        return self.call(functional.wait_tensor.default, self.call(operator.getitem, launched, index))

    def program(self, *results: fx.Node) -> Program:
        self.graph.output(tuple(results))
        outputs = [Output(OutputKind.USER, str(index)) for index in range(len(results))]
        return Program(fx.GraphModule({}, self.graph), self.roles, outputs, Level.STEP, {})


def real_inputs(program: Program) -> list[Any]:
    """A real tensor for every fake input; integers are small enough to index with."""
    return [_real(node.meta["val"]) for node in program.placeholders]


def _real(value: torch.Tensor) -> torch.Tensor:
    sizes = tuple(int(size) for size in value.shape)
    if value.is_floating_point():
        return torch.rand(sizes, dtype=value.dtype)
    return torch.zeros(sizes, dtype=value.dtype)


def run(program: Program, inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, dict[fx.Node, Any]]]:
    """Each call node with all values there are while it ends; values that no later node reads are dropped after it."""
    nodes = list(program.graph.nodes)
    values: dict[fx.Node, Any] = dict(zip(program.placeholders, inputs, strict=True))
    for index, node in enumerate(nodes):
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            yield node, values
            read = {source for later in nodes[index + 1 :] for source in later.all_input_nodes}
            values = {n: v for n, v in values.items() if n.op == "placeholder" or n in read}


def storage_bytes(values: dict[fx.Node, Any]) -> int:
    """Bytes of the distinct storages under all tensors among `values`."""
    tensors = [t for v in values.values() for t in (v if isinstance(v, (list, tuple)) else [v])]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
