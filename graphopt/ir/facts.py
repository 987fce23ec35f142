"""One typed record of facts for each node, under one key of `node.meta`."""

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from torch import fx

_KEY = "graphopt"


class Phase(enum.Enum):
    """When a node runs."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class NodeFacts:
    """What is known of a node beyond its operator and its value.

    module: dotted path of the module whose code made it (of the forward node, for a backward node).
    source: ``file.py:123`` in the model's code.
    layer: path of the repeated block it belongs to, such as ``model.layers.3``; None outside any.
    checkpoint: number of the region of `torch.utils.checkpoint` it belongs to, whose values are computed again.
    checkpoint_saves: operators whose results that region saves all the same (a selective checkpoint).
    origin: name of the node it was derived from, in the graph before the pass that made it.
    made_by: the pass that made it (``capture`` for those of the model itself).
    resident: the value lives in storage that outlasts the step (a gathered parameter in ZeRO 1 and 2).
    outside: the value's storage is not in the memory that the program computes in (in files, on a GPU's host).
    kept: the value, a gathered parameter, is meant to stay from forward to backward.
    reasons: why it is what and where it is, a sentence from each pass that had one: ``zero: …``.
    """

    phase: Phase = Phase.FORWARD
    module: str = ""
    source: str | None = None
    layer: str | None = None
    checkpoint: int | None = None
    checkpoint_saves: tuple[str, ...] = ()
    origin: str | None = None
    made_by: str = "capture"
    resident: bool = False
    outside: bool = False
    kept: bool = False
    reasons: tuple[str, ...] = ()


_NOTHING = NodeFacts()


def facts_of(node: fx.Node) -> NodeFacts:
    """The facts of `node`; the empty record if none were stated."""
    facts = node.meta.get(_KEY, _NOTHING)
    assert isinstance(facts, NodeFacts)
    return facts


def annotate(node: fx.Node, like: fx.Node | None = None, **changes: Any) -> fx.Node:
    """State facts of `node`: those of `like` (by default its own so far) with `changes`. Returns `node`."""
    node.meta[_KEY] = dataclasses.replace(facts_of(like if like is not None else node), **changes)
    return node


def explain(node: fx.Node, by: str, reason: str) -> None:
    """Add why the pass `by` made, changed or moved `node`."""
    annotate(node, reasons=(*facts_of(node).reasons, f"{by}: {reason}"))
