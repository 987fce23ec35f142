"""Arguments that say sizes, on parts."""

import torch
from torch import fx

from graphopt.dimensions.local import localized_arguments
from tests.dimensions.calls import real
from tests.support.parts import node_of

aten = torch.ops.aten


def test_sizes_that_do_not_change_stay_as_they_are_given() -> None:
    graph = fx.Graph()
    x, rows = graph.placeholder("x"), graph.placeholder("rows")
    x.meta["val"], rows.meta["val"] = real(2, 12), 2
    node = graph.call_function(aten.reshape.default, (x, [rows, -1, 4]))
    node.meta["val"] = real(2, 3, 4)
    assert localized_arguments(node, [(2, 6)], [(2, 3, 2)]) == ((x, [rows, -1, 2]), {})
    assert localized_arguments(node, [(2, 4)], [(2, 1, 4)]) == ((x, [rows, 1, 4]), {})


def test_arguments_that_were_left_out_are_given_by_name() -> None:
    image, weight = real(2, 6, 8), real(6, 1, 3)
    node = node_of(aten.conv1d.default, image, weight, None, groups=6)
    args, kwargs = localized_arguments(node, [(2, 3, 8), (3, 1, 3)], [(2, 3, 6)])
    assert args == node.args and kwargs == {"groups": 3}
    node = node_of(aten.slice.Tensor, real(6, 2))
    assert localized_arguments(node, [(3, 2)], [(3, 2)])[1] == {"end": 3}


def test_other_operators_keep_their_arguments() -> None:
    node = node_of(aten.softmax.int, real(4, 6), -1)
    assert localized_arguments(node, [(2, 6)], [(2, 6)]) == (node.args, node.kwargs)
