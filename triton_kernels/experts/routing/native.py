"""Routing by `graphopt.cuda_ext`; functions have the arguments and results of those in `reference`."""

from torch import Tensor

from graphopt.cuda_ext import experts
from graphopt.triton_kernels.experts.routing import reference


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scores: str,
    normalized: bool,
    epsilon: float,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    options = (top_k, scores, normalized, epsilon, scale, groups, top_groups)
    if not experts.is_built():
        return reference.route(logits, bias, *options)
    return experts.route(logits.contiguous(), None if bias is None else bias.contiguous(), *options)


def route_backward(
    logits: Tensor, gradient: Tensor, chosen: Tensor, scores: str, normalized: bool, epsilon: float, scale: float
) -> Tensor:
    if not experts.is_built():
        return reference.route_backward(logits, gradient, chosen, scores, normalized, epsilon, scale)
    tensors = (logits.contiguous(), gradient.contiguous(), chosen.contiguous())
    return experts.route_backward(*tensors, scores, normalized, epsilon, scale)
