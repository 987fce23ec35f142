"""What a pipeline's executor knows of a stage."""

from collections.abc import Sequence
from typing import Protocol

import torch

from graphopt.runtime.messages import TensorSpec


class Stage(Protocol):
    """One stage of a model; it keeps what it needs of a microbatch from its forward to its last backward.

    What comes before the stage and what goes behind it are lists of tensors of one order on both sides; a gradient of
    theirs is None where there is none. The first stage receives nothing, the last one gives nothing on. A stage may
    take what it is given out of the lists, which lets it decide how long each lives.
    """

    def forward(self, microbatch: int, received: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What the next stage receives."""
        ...

    def backward(self, microbatch: int, gradients: list[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Gradients of what was received, by those of what went on; those of weights are added up in the stage."""
        ...

    def input_gradients(self, microbatch: int, gradients: list[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """The part of `backward` that the stage before waits for."""
        ...

    def weight_gradients(self, microbatch: int) -> None:
        """The rest of `backward`, later."""
        ...

    def incoming(self, microbatch: int) -> Sequence[TensorSpec]:
        """Of what `forward` receives."""
        ...

    def outgoing(self, microbatch: int) -> Sequence[TensorSpec]:
        """Of what `forward` gives on."""
        ...

    def incoming_gradients(self, microbatch: int) -> Sequence[bool]:
        """Which of what is received has a gradient; it has the same shape and dtype."""
        ...

    def outgoing_gradients(self, microbatch: int) -> Sequence[bool]:
        """Which of what goes on has one."""
        ...
