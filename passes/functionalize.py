"""Operations in place, as autograd records them, become operations with a result of their own."""

import torch
from torch import fx

from graphopt._torch import OpOverload, is_mutating
from graphopt.errors import PassError
from graphopt.ir import Program, is_view

aten = torch.ops.aten
_FUNCTIONAL = {aten.bernoulli_.float: aten.bernoulli.p}


def functionalize(program: Program) -> int:
    """Rewrite each operation that writes its first argument; what reads that argument later reads the result.

    Attention with dropout, for one, is recorded as a draw and a division in place. Raises PassError where the argument
    is seen through another view as well.
    """
    rewritten = 0
    for node in list(program.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, OpOverload) and is_mutating(node.target):
            _rewrite(node)
            rewritten += 1
    return rewritten


def _rewrite(node: fx.Node) -> None:
    written = node.args[0]
    assert isinstance(written, fx.Node) and isinstance(node.target, OpOverload)
    later = [user for user in written.users if node < user]
    views = [user.name for user in written.users if user < node and is_view(user) and any(node < u for u in user.users)]
    if is_view(written) or views:
        through = written.name if is_view(written) else ", ".join(views)
        raise PassError(f"{node.name} ({node.target}) writes what is also seen through the view {through}")
    node.target = _functional(node.target, node)
    for user in later:
        user.replace_input_with(written, node)


def _functional(target: OpOverload, node: fx.Node) -> OpOverload:
    """The operator that gives what `target` writes."""
    known = _FUNCTIONAL.get(target)
    if known is not None:
        return known
    packet = getattr(torch.ops.aten, target.overloadpacket.__name__.removesuffix("_"), None)
    found = getattr(packet, target.__name__.rpartition(".")[2], None)
    if not isinstance(found, OpOverload) or is_mutating(found):
        raise PassError(f"{node.name} ({target}) writes an argument, and there is no {target} without that")
    return found
