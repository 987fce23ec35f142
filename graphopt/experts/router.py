"""Which experts a token goes to, and with what weights."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from graphopt._torch import BuffersAsMade
from graphopt.experts.capacity import beyond_capacity, capacity_of
from graphopt.experts.checks import check_choice, check_positive
from graphopt.experts.losses import load_balancing_loss, loads_of, router_z_loss

SCORES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}
PRIORITIES = ("order", "weight")


class Routing(NamedTuple):
    """What a router says of a batch of tokens.

    chosen: int64 [tokens, top_k], experts by number, best first; the number of experts stands for none, where an expert
    had no room. weights: [tokens, top_k], zero there. loads: float32 [experts], how often each was chosen, with or
    without room. balance_loss, z_loss: of no dimension, to be added to the loss times factors of your own (0.01 and
    0.001 in the papers). Those two and weights have gradients.
    """

    chosen: torch.Tensor
    weights: torch.Tensor
    loads: torch.Tensor
    balance_loss: torch.Tensor
    z_loss: torch.Tensor


class Router(BuffersAsMade):
    """Chooses the `top_k` best of `experts` for each token; in float32, whatever the tokens are in.

    scores: ``softmax`` or ``sigmoid`` of the logits. normalized: whether the weights of a token's choices have sum one.
    capacity: None, or a factor: an expert has room for ``ceil(capacity * tokens * top_k / experts)`` tokens of a batch,
    and choices for which there is none are dropped. priority: which come first, by ``order`` of the tokens or by
    ``weight`` of the choice. bias_speed: above zero, choices go by scores plus a bias for each expert, while weights go
    by scores alone; each call in training moves the bias by that much, up where an expert was chosen less than the mean
    and down where it was chosen more (auxiliary-loss-free load balancing, Wang et al. 2024,
    https://arxiv.org/abs/2408.15664). The bias is a buffer, and stays in float32 when the module is cast: in bfloat16
    a small step would be lost.

    Raises ValueError for sizes that cannot be and for names that there are not.
    """

    weight: nn.Parameter
    bias: torch.Tensor | None

    def __init__(
        self,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        scores: str = "softmax",
        normalized: bool = True,
        capacity: float | None = None,
        priority: str = "order",
        bias_speed: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, top_k=top_k)
        check_choice("scores", scores, SCORES)
        check_choice("priority", priority, PRIORITIES)
        if experts < 2:
            raise ValueError(f"experts is {experts}, where there is nothing to choose; take at least 2, or FeedForward")
        if top_k > experts:
            raise ValueError(f"top_k is {top_k}, but there are {experts} experts; the nearest is {experts}")
        if capacity is not None and not capacity > 0:
            raise ValueError(f"capacity is {capacity}, where a factor above 0 is needed, or None to drop no token")
        if not bias_speed >= 0:
            raise ValueError(f"bias_speed is {bias_speed}, where 0 is the least")
        self.hidden, self.experts, self.top_k = hidden, experts, top_k
        self.scores, self.normalized = scores, normalized
        self.capacity, self.priority, self.bias_speed = capacity, priority, bias_speed
        self.weight = nn.Parameter(torch.empty(experts, hidden, device=device, dtype=dtype))
        bias = torch.empty(experts, device=device, dtype=torch.float32) if bias_speed else None
        self.register_buffer("bias", bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight as that of `nn.Linear`, and have the bias zero."""
        nn.init.uniform_(self.weight, -(self.hidden**-0.5), self.hidden**-0.5)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: torch.Tensor) -> Routing:
        """x: [tokens, hidden]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = SCORES[self.scores](logits)
        weights, chosen = self._choose(scores)
        loads = loads_of(chosen, self.experts)
        if self.bias is not None and self.training:
            self.bias.add_(self.bias_speed * (loads.mean() - loads).sign())
        probabilities = scores if self.scores == "softmax" else _normalized(scores)
        balance = load_balancing_loss(probabilities, loads)
        if self.normalized:
            weights = _normalized(weights)
        if self.capacity is not None:
            room = capacity_of(self.capacity, x.shape[0], self.top_k, self.experts)
            by_weight = weights if self.priority == "weight" else None
            dropped = beyond_capacity(chosen, self.experts, room, by_weight)
            chosen, weights = chosen.masked_fill(dropped, self.experts), weights.masked_fill(dropped, 0)
        return Routing(chosen, weights.to(x.dtype), loads, balance, router_z_loss(logits))

    def _choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers of the experts chosen, [tokens, top_k] both."""
        if self.bias is None:
            weights, chosen = scores.topk(self.top_k)
            return weights, chosen
        chosen = (scores.detach() + self.bias).topk(self.top_k).indices
        return scores.gather(-1, chosen), chosen

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"top_k": self.top_k, "scores": self.scores, "normalized": self.normalized}
        if self.capacity is not None:
            shown |= {"capacity": self.capacity, "priority": self.priority}
        if self.bias_speed:
            shown["bias_speed"] = self.bias_speed
        return f"{self.hidden}, {self.experts}, " + ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _normalized(scores: torch.Tensor) -> torch.Tensor:
    """Of sum one; zeros stay zeros."""
    return scores / (scores.sum(-1, keepdim=True) + torch.finfo(scores.dtype).tiny)
