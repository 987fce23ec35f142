"""The experts of a layer, with their router."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphopt.experts.checks import check_choice, check_positive
from graphopt.experts.feed_forward import ACTIVATIONS, FeedForward, activated
from graphopt.experts.losses import loads_of
from graphopt.experts.router import Router, Routing
from graphopt.triton_kernels.experts.products.op import GROUPED_MM


class Experts(nn.Module):
    """Feed-forward networks, each for the tokens that a router sends there: x [..., hidden] -> [..., hidden].

    A token gets the sum of what its experts give, by their weights, and what the shared experts give (DeepSeekMoE, Dai
    et al. 2024, https://arxiv.org/abs/2401.06066), through which every token goes. One that no expert had room for gets
    nothing of them: add x outside, as transformers do.

    intermediate: the width of one expert. gated, activation: as of `FeedForward`. shared: how many experts' width the
    shared network has. routing: the other arguments of `Router`. The weights of all experts are stacked, [experts, out,
    in]; tokens are sorted by expert and multiplied group by group, however uneven the groups.

    Raises ValueError as `FeedForward` and `Router` do, and for tokens of another width.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        experts: int,
        top_k: int,
        *,
        gated: bool = True,
        activation: str = "silu",
        shared: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing: Any,
    ) -> None:
        super().__init__()
        check_positive(intermediate=intermediate)
        check_choice("activation", activation, ACTIVATIONS)
        if shared < 0:
            raise ValueError(f"shared is {shared}, where 0 is the least")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gated, self.activation = gated, activation
        self.router = Router(hidden, experts, top_k, **routing, **where)
        self.up = nn.Parameter(torch.empty(experts, (2 if gated else 1) * intermediate, hidden, **where))
        self.down = nn.Parameter(torch.empty(experts, hidden, intermediate, **where))
        self.shared: FeedForward | None = None
        if shared:
            self.shared = FeedForward(hidden, shared * intermediate, gated=gated, activation=activation, **where)
        self._reset_own()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, each expert's matrices as those of `nn.Linear`."""
        self._reset_own()
        self.router.reset_parameters()
        if self.shared is not None:
            self.shared.up.reset_parameters()
            self.shared.down.reset_parameters()

    @torch.no_grad()
    def _reset_own(self) -> None:
        for stacked in (self.up, self.down):
            nn.init.uniform_(stacked, -(stacked.shape[-1] ** -0.5), stacked.shape[-1] ** -0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """What the experts give, and how tokens were routed, with the losses of that."""
        hidden = self.router.hidden
        if x.shape[-1] != hidden:
            raise ValueError(f"x is {list(x.shape)}, but its last dimension must be hidden, {hidden}")
        tokens = x.reshape(-1, hidden)
        routing = self.router(tokens)
        y = mixed(tokens, routing.chosen, routing.weights, self.router.experts, self._run)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.reshape(x.shape), routing

    def _run(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        inner = activated(grouped_linear(rows, self.up, ends), self.gated, self.activation)
        return grouped_linear(inner, self.down, ends)

    def extra_repr(self) -> str:
        shapes = f"up={list(self.up.shape)}, down={list(self.down.shape)}"
        return f"{shapes}, gated={self.gated}, activation={self.activation!r}"


def mixed(
    tokens: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: int,
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Each token's sum of what its experts give, times their weights: [tokens, hidden].

    tokens: [tokens, hidden]. chosen, weights: [tokens, top_k]; the number `experts` stands for none. run: gives for
    rows sorted by expert, and for where those of each end, int32 [experts], what the rows become, and zeros past the
    last end. No size depends on a value, so that all of it can be captured.
    """
    top_k = chosen.shape[1]
    numbers, order = chosen.reshape(-1).sort()
    rows, scales = tokens[order // top_k], weights.reshape(-1)[order]
    ends = loads_of(numbers, experts).cumsum(0, dtype=torch.int32)
    results = run(rows, ends) * scales.unsqueeze(-1)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=order.device)
    return results[places].view(tokens.shape[0], top_k, results.shape[-1]).sum(1).to(tokens.dtype)


def grouped_linear(rows: torch.Tensor, stacked: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows [t, in] times their group's matrix of [experts, out, in]; in the dtype of autocast, if that is on."""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stacked.dtype
    product: torch.Tensor = GROUPED_MM(rows.to(dtype), stacked.to(dtype).mT, ends)
    return product
