"""The neighbourhood of a node, for messages."""

from torch import fx

from graphopt.ir.printer import format_node

_AROUND = 10


def surroundings(node: fx.Node) -> str:
    """Ten nodes on each side, `node` marked."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    return "\n".join(
        f"{'>' if n is node else ' '} {format_node(n)}" for n in nodes[max(0, at - _AROUND) : at + _AROUND + 1]
    )
