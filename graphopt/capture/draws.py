"""Random numbers that are drawn in place come in the order in which the elements lie in memory."""

import torch
from torch import fx

from graphopt._torch import FakeTensorMode
from graphopt.ir.values import in_example, is_contiguous, is_dense

aten = torch.ops.aten


def draw_as_laid_out(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Have each draw into memory like that of a value (dropout in place) come in the order in which that value lies.

    Export writes it as an operator whose result is contiguous, so draws for a transposed value came in another order
    than in eager.
    """
    changed = False
    for node in graph.nodes:
        if changed and node.op == "call_function":
            values = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
            with fake_mode, torch.no_grad():
                node.meta["val"] = node.target(*values[0], **values[1])
        if node.target is not aten.bernoulli.p or node.args[0].target is not aten.empty_like.default:
            continue
        into = node.args[0].meta["val"]
        if is_dense(into) and not is_contiguous(into):
            _draw_in_order(graph, node, fake_mode)
            changed = True


def _draw_in_order(graph: fx.Graph, node: fx.Node, fake_mode: FakeTensorMode) -> None:
    """Draw with the dimensions from the slowest to the fastest, then put them back."""
    into = node.args[0]
    assert isinstance(into, fx.Node)
    value = into.meta["val"]
    order = sorted(range(value.dim()), key=lambda dim: -in_example(value.stride(dim)))
    with graph.inserting_before(node):
        laid_out = graph.call_function(aten.permute.default, (into, order))
    with graph.inserting_after(node):
        drawn = graph.call_function(aten.permute.default, (node, [order.index(dim) for dim in range(value.dim())]))
    node.replace_all_uses_with(drawn, delete_user_cb=lambda user: user is not drawn)
    node.replace_input_with(into, laid_out)
    with fake_mode, torch.no_grad():
        laid_out.meta = {**node.meta, "val": value.permute(order)}
        drawn.meta = dict(node.meta)
        node.meta = {**node.meta, "val": torch.empty_like(laid_out.meta["val"], memory_format=torch.contiguous_format)}
