"""What each input and output of a program is, as data: nothing is ever guessed from a node's name."""

import enum
import re
from dataclasses import dataclass

from graphopt.ir.layout import Split


class InputKind(enum.Enum):
    """Where a placeholder's value comes from."""

    PARAMETER = "parameter"  # the whole parameter
    SHARD = "shard"  # this rank's rows of the parameter, padded to be equal on all ranks
    BUFFER = "buffer"
    CONSTANT = "constant"  # a tensor the model's code made, not registered anywhere
    BATCH = "batch"  # a tensor (or symbolic int) among the call's arguments
    TANGENT = "tangent"  # the gradient that arrives at a user output
    SAVED = "saved"  # computed by the forward half, read by the backward half
    RECEIVED = "received"  # computed by an earlier stage of a pipeline


class OutputKind(enum.Enum):
    """Where an output's value goes."""

    USER = "user"
    BUFFER = "buffer"  # the new value of a buffer that forward updates
    GRADIENT = "gradient"  # of a parameter, whole or shard
    BATCH_GRADIENT = "batch gradient"  # of a tensor among the call's arguments
    SAVED = "saved"
    SENT = "sent"  # read by a later stage of a pipeline
    RECEIVED_GRADIENT = "received gradient"  # of what an earlier stage computed, for that stage


GRADIENTS = (OutputKind.GRADIENT, OutputKind.BATCH_GRADIENT, OutputKind.RECEIVED_GRADIENT)


@dataclass(frozen=True)
class Input:
    """The role of one placeholder.

    name: the parameter's or buffer's fully qualified name, the path of a batch leaf (``kwargs['input_ids']``), the
        output a tangent belongs to, or the node a saved or received value comes from.
    requires_grad: whether the step asks for its gradient.
    """

    kind: InputKind
    name: str
    requires_grad: bool = False

    def __str__(self) -> str:
        return f"{self.kind.value} {self.name}"

    @property
    def identifier(self) -> str:
        """A Python identifier for the placeholder: for the reader, never parsed back."""
        suffix = "" if self.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.BATCH) else f"_{self.kind.value}"
        return "v_" * (not self.name[:1].isalpha()) + re.sub(r"\W+", "_", self.name).strip("_") + suffix


@dataclass(frozen=True)
class Output:
    """The role of one output; `name` as in `Input` (a gradient carries the name of what it is the gradient of).

    requires_grad: of an output of forward, whether autograd can reach an input from it.
    splits: of a user output, the axes over which each rank returns a part of it, in the order in which they cut it.
    """

    kind: OutputKind
    name: str
    requires_grad: bool = False
    splits: tuple[Split, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind.value} {self.name}"
