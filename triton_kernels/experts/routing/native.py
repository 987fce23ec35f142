"""Routing by `graphopt.cuda_ext`; functions have the arguments and results of those in `reference`."""

from torch import Tensor

from graphopt.cuda_ext import experts
from graphopt.cuda_ext.experts import Weighing
from graphopt.triton_kernels.experts.routing import reference


def route(
    logits: Tensor, bias: Tensor | None, top_k: int, weighing: Weighing, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    options = (top_k, weighing, groups, top_groups)
    if not experts.is_built():
        return reference.route(logits, bias, *options)
    return experts.route(logits.contiguous(), None if bias is None else bias.contiguous(), *options)


def route_backward(logits: Tensor, gradient: Tensor, chosen: Tensor, weighing: Weighing) -> Tensor:
    if not experts.is_built():
        return reference.route_backward(logits, gradient, chosen, weighing)
    tensors = (logits.contiguous(), gradient.contiguous(), chosen.contiguous())
    return experts.route_backward(*tensors, weighing)
