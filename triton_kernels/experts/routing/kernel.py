"""Routing on a GPU; functions have the arguments and results of those in `reference`.

A program holds all scores of some tokens, and takes the largest `top_k` times. A token's experts lie in a tile group by
group, each filled up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.cuda_ext.experts import Weighing
from graphopt.triton_kernels.launch import launch, power_of_two, rows_of

_ELEMENTS = 1024  # of a tile, at least
_WARPS = 4


@triton.jit
def _scores(logits, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        return powers / tl.sum(powers, axis=1)[:, None]
    return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit
def _forward(
    LOGITS, BIAS, WEIGHTS, CHOSEN, stride, tokens, groups, size, top_groups, epsilon, scale,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZED: tl.constexpr, LIMITED: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < tokens
    place = tl.arange(0, GROUPS * SIZE)
    expert = place // SIZE * size + place % SIZE
    is_expert = (place // SIZE < groups) & (place % SIZE < size)
    inside = is_row[:, None] & is_expert[None, :]
    logits = tl.load(LOGITS + row[:, None] * stride + expert[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    scores = _scores(logits, SOFTMAX)
    keys = scores
    if BIAS is not None:
        keys += tl.load(BIAS + expert, mask=is_expert, other=0.0)[None, :]
    keys = tl.where(keys == keys, keys, float("inf"))
    if LIMITED:
        by_group = tl.reshape(tl.where(is_expert[None, :], keys, float("-inf")), (ROWS, GROUPS, SIZE))
        first = tl.argmax(by_group, axis=2)
        others = tl.where(tl.arange(0, SIZE)[None, None, :] == first[:, :, None], float("-inf"), by_group)
        totals = tl.max(by_group, axis=2) + tl.max(others, axis=2)
        number = tl.arange(0, GROUPS)
        one, other = totals[:, :, None], totals[:, None, :]
        is_before = (other > one) | ((other == one) & (number[None, None, :] < number[None, :, None]))
        is_taken = tl.sum(is_before.to(tl.int32), axis=2) < top_groups
        keys = tl.reshape(tl.where(is_taken[:, :, None], by_group, float("-inf")), (ROWS, GROUPS * SIZE))
    # What is no expert, or is chosen already, is below all others.
    keys = tl.where(is_expert[None, :], tl.maximum(keys, -3.4e38), float("-inf"))
    slot = tl.arange(0, SLOTS)
    weights = tl.zeros((ROWS, SLOTS), dtype=tl.float32)
    chosen = tl.zeros((ROWS, SLOTS), dtype=tl.int32)
    for index in range(TOP_K):
        best = tl.argmax(keys, axis=1)
        is_best = place[None, :] == best[:, None]
        is_slot = slot[None, :] == index
        weights = tl.where(is_slot, tl.sum(tl.where(is_best, scores, 0.0), axis=1)[:, None], weights)
        chosen = tl.where(is_slot, (best // SIZE * size + best % SIZE)[:, None], chosen)
        keys = tl.where(is_best, float("-inf"), keys)
    if NORMALIZED:
        weights = weights / (tl.sum(weights, axis=1) + epsilon)[:, None]
    at = row[:, None] * TOP_K + slot[None, :]
    is_choice = is_row[:, None] & (slot < TOP_K)[None, :]
    tl.store(WEIGHTS + at, weights * scale, mask=is_choice)
    tl.store(CHOSEN + at, chosen.to(tl.int64), mask=is_choice)


@triton.jit
def _backward(
    LOGITS, GRADIENT, CHOSEN, OF_LOGITS, stride, tokens, experts, epsilon, scale,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZED: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < tokens
    expert = tl.arange(0, EXPERTS)
    inside = is_row[:, None] & (expert < experts)[None, :]
    logits = tl.load(LOGITS + row[:, None] * stride + expert[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    scores = _scores(logits, SOFTMAX)
    gradient = tl.zeros((ROWS, EXPERTS), dtype=tl.float32)
    is_chosen = gradient > 0.0
    for index in range(TOP_K):
        chosen = tl.load(CHOSEN + row * TOP_K + index, mask=is_row, other=-1)
        given = tl.load(GRADIENT + row * TOP_K + index, mask=is_row, other=0.0).to(tl.float32)
        is_this = expert[None, :] == chosen[:, None]
        gradient = tl.where(is_this, given[:, None] * scale, gradient)
        is_chosen |= is_this
    picked = tl.where(is_chosen, scores, 0.0)
    if NORMALIZED:
        total = (tl.sum(picked, axis=1) + epsilon)[:, None]
        shared = tl.sum(gradient * picked, axis=1)[:, None] / total
        gradient = tl.where(is_chosen, (gradient - shared) / total, 0.0)
    if SOFTMAX:
        gradient = scores * (gradient - tl.sum(gradient * picked, axis=1)[:, None])
    else:
        gradient = gradient * scores * (1.0 - scores)
    at = row[:, None] * experts + expert[None, :]
    tl.store(OF_LOGITS + at, gradient.to(OF_LOGITS.dtype.element_ty), mask=inside)


def route(
    logits: Tensor, bias: Tensor | None, top_k: int, weighing: Weighing, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    rows = rows_of(logits)
    tokens, experts = rows.shape
    is_limited = top_groups < groups
    if not is_limited:
        groups = top_groups = 1
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    held, size = power_of_two(groups), power_of_two(experts // groups)
    height = max(1, _ELEMENTS // (held * size))
    launch(_forward, triton.cdiv(tokens, height), rows, None if bias is None else bias.contiguous(), weights, chosen,
           rows.stride(0), tokens, groups, experts // groups, top_groups, weighing.epsilon, weighing.scale,
           warps=_WARPS, TOP_K=top_k, SOFTMAX=weighing.scores == "softmax", NORMALIZED=weighing.normalized,
           LIMITED=is_limited, ROWS=height, GROUPS=held, SIZE=size, SLOTS=power_of_two(top_k))  # fmt: skip
    return weights, chosen


def route_backward(logits: Tensor, gradient: Tensor, chosen: Tensor, weighing: Weighing) -> Tensor:
    rows = rows_of(logits)
    tokens, experts = rows.shape
    of_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    held = power_of_two(experts)
    height = max(1, _ELEMENTS // held)
    launch(_backward, triton.cdiv(tokens, height), rows, gradient.contiguous(), chosen.contiguous(), of_logits,
           rows.stride(0), tokens, experts, weighing.epsilon, weighing.scale, warps=_WARPS, TOP_K=chosen.shape[1],
           SOFTMAX=weighing.scores == "softmax", NORMALIZED=weighing.normalized, ROWS=height, EXPERTS=held)  # fmt: skip
    return of_logits
