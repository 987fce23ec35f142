"""What one expert is: two or three matrices with an activation between."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from graphopt.experts.checks import check_choice, check_positive

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (with silu SwiGLU, Shazeer 2020), without biases.

    x: [..., hidden] -> [..., hidden]. Gate and up are one projection, gate first. Raises ValueError for sizes below one
    and for an activation that is not in ACTIVATIONS.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        gated: bool = True,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, intermediate=intermediate)
        check_choice("activation", activation, ACTIVATIONS)
        self.gated, self.activation = gated, activation
        self.up = nn.Linear(hidden, (2 if gated else 1) * intermediate, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(intermediate, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.down(activated(self.up(x), self.gated, self.activation))
        return projected

    def extra_repr(self) -> str:
        return f"gated={self.gated}, activation={self.activation!r}"


def activated(x: torch.Tensor, gated: bool, activation: str) -> torch.Tensor:
    """What goes from the first product to the second: [..., 2 n] -> [..., n] if gated, else of the same shape."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(x)
    gate, up = x.chunk(2, -1)
    return act(gate) * up
