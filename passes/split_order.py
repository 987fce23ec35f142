"""In which order ranks have the rows of a sequence that is cut for its own sake: balanced, where a mask is causal."""

from torch import fx

from graphopt._torch import argument
from graphopt.dimensions.forms import BALANCED, Order
from graphopt.dimensions.signature import operands_of
from graphopt.ir import Program
from graphopt.passes.causal_masks import ATTENTION, causal_calls, state_causal
from graphopt.passes.grouped_heads import state_grouped
from graphopt.passes.rewrite import remove_dead


def choose_order(program: Program, ranks: int) -> tuple[Order | None, str]:
    """The order, None for that of the whole, and why. One for all values: what is cut otherwise would be gathered.

    It is balanced if each causal attention can run so. Then those calls say that they are causal and grouped, and what
    was made for them alone, masks and repeated keys, is gone.
    """
    calls = causal_calls(program)
    if not calls:
        return None, "that of the whole, for no attention is known to be causal"
    for node in calls:
        rows = node.args[0].meta["val"].shape[-2]  # type: ignore[union-attr]
        why = why_unbalanced(node)
        if why is None and not (type(rows) is int and rows % (2 * ranks) == 0):
            why = f"its {rows} rows are not {2 * ranks} equal chunks"
        if why is not None:
            return None, f"that of the whole, for {node.name} cannot run in balanced parts: {why}"
    for node in calls:
        state_causal(node)
        state_grouped(node)
    remove_dead(program)
    return BALANCED, f"balanced, for all {len(calls)} causal attention calls can run so"


def why_unbalanced(node: fx.Node) -> str | None:
    """Why a causal attention cannot run in balanced parts of its queries and keys; None if it can."""
    query, key, value = (operand.meta["val"].shape for operand in operands_of(node)[:3])
    if argument(ATTENTION, "dropout_p", node.args, node.kwargs):
        return "it drops scores"
    if str(query[-2]) != str(key[-2]):
        return f"it has {query[-2]} queries of {key[-2]} keys"
    if not (len(query) == len(key) == len(value) == 4 and query[0] == key[0] == value[0] and key[1] == value[1]):
        return "its operands have not all the dimensions batch, heads, rows and width alike"
    return "its values are wider than its keys" if value[-1] > key[-1] else None
