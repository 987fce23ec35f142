"""The operators of routing. What they compute is written in `reference`, where their arguments are told."""

from typing import Any

import torch
from torch import Tensor

from graphopt.cuda_ext.experts import Weighing
from graphopt.nearest import nearest
from graphopt.triton_kernels.choice import OF_CPU, Family
from graphopt.triton_kernels.experts.routing.reference import SCORES
from graphopt.triton_kernels.registration import check_floating, define, describe

FAMILY = Family("experts.routing", widest=4096, native=OF_CPU)


def _route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scores: str,
    normalized: bool,
    epsilon: float,
    scale: float,
    groups: int,
    top_groups: int,
) -> Any:
    _check(logits, scores, "route")
    experts = logits.shape[1]
    if bias is not None and (
        bias.shape != logits.shape[1:] or bias.dtype != torch.float32 or bias.device != logits.device
    ):
        raise ValueError(f"route: bias is {describe(bias)}, not float32 [{experts}] on {logits.device}")
    if groups < 1 or experts % groups or (experts < 2 * groups and top_groups < groups):
        raise ValueError(f"route: groups is {groups}, which does not cut {experts} experts into groups of two or more")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"route: top_groups is {top_groups}, not from 1 to {groups}")
    most = top_groups * (experts // groups)
    if not 1 <= top_k <= most:
        raise ValueError(f"route: top_k is {top_k}, not from 1 to {most}, the experts there are to choose from")
    weighing = Weighing(scores, normalized, epsilon, scale)
    return FAMILY.run("route", logits, bias, top_k, weighing, groups, top_groups)


def _route_backward(
    gradient: Tensor, logits: Tensor, chosen: Tensor, scores: str, normalized: bool, epsilon: float, scale: float
) -> Any:
    _check(logits, scores, "route_backward")
    for name, tensor, dtype in (("gradient", gradient, _exact(logits)), ("chosen", chosen, torch.int64)):
        fits = tensor.dim() == 2 and len(tensor) == len(logits) and tensor.shape == chosen.shape
        if not fits or tensor.dtype != dtype or tensor.device != logits.device:
            raise ValueError(f"route_backward: {name} is {describe(tensor)}, not {dtype} as `route` gave weights")
    if chosen.is_cpu and chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < logits.shape[1]:
        raise ValueError(f"route_backward: chosen has numbers that are none of {logits.shape[1]} experts")
    if chosen.shape[1] > logits.shape[1]:
        raise ValueError(f"route_backward: chosen is {describe(chosen)}, for {logits.shape[1]} experts")
    return FAMILY.run("route_backward", logits, gradient, chosen, Weighing(scores, normalized, epsilon, scale))


def _check(logits: Tensor, scores: str, operator: str) -> None:
    check_floating(operator, "logits", logits)
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"{operator}: logits is {describe(logits)}, not [tokens, experts]")
    if scores not in SCORES:
        raise ValueError(f"{operator}: scores is {scores!r}: {nearest(scores, SCORES)}")


def _exact(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _fake(logits: Tensor, bias: Tensor | None, top_k: int, *options: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=_exact(logits)), logits.new_empty(shape, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, *options, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])
    ctx.options = options


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, chosen = ctx.saved_tensors
    return ROUTE_BACKWARD(gradient, logits, chosen, *ctx.options), *[None] * 8


ROUTE_BACKWARD = define(
    "route_backward(Tensor gradient, Tensor logits, Tensor chosen, str scores, bool normalized, float epsilon,"
    " float scale) -> Tensor",
    _route_backward,
    lambda gradient, logits, *options: logits.new_empty(logits.shape),
    family=FAMILY,
)
ROUTE = define(
    "route(Tensor logits, Tensor? bias, int top_k, str scores, bool normalized, float epsilon, float scale,"
    " int groups, int top_groups) -> (Tensor, Tensor)",
    _route,
    _fake,
    save=_save,
    backward=_backward,
    family=FAMILY,
)
