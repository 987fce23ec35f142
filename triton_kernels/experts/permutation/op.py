"""The operators that put tokens by expert and back. What they compute is written in `reference`."""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_CPU, Family
from graphopt.triton_kernels.registration import check_floating, define, describe

_INTEGERS = frozenset({torch.int32, torch.int64})
SORTING = Family("experts.permutation", widest=2**31 - 1, native=frozenset({torch.int64}), triton=_INTEGERS)
FAMILY = Family("experts.permutation", widest=2**31 - 1, native=OF_CPU)
_MOST_EXPERTS = 4095  # whose counts a program holds, with that of no expert


def _sort_by_expert(chosen: Tensor, experts: int) -> Any:
    if chosen.dtype not in _INTEGERS or not chosen.dim():
        raise ValueError(f"sort_by_expert: chosen is {describe(chosen)}, not int32 or int64 of at least one dimension")
    if not 1 <= experts <= _MOST_EXPERTS:
        raise ValueError(f"sort_by_expert: experts is {experts}, not from 1 to {_MOST_EXPERTS}")
    return SORTING.run("sort_by_expert", chosen, experts)


def _permute_tokens(x: Tensor, places: Tensor) -> Any:
    _check_rows("permute_tokens", "x", x)
    _check_places("permute_tokens", places, x)
    if len(places) != len(x):
        raise ValueError(f"permute_tokens: places is {describe(places)}, not [{len(x)}, top_k] for x, {describe(x)}")
    return FAMILY.run("permute_tokens", x, places)


def _unpermute_tokens(rows: Tensor, weights: Tensor | None, places: Tensor) -> Any:
    _check_rows("unpermute_tokens", "rows", rows)
    _check_placed("unpermute_tokens", rows, weights, places)
    return FAMILY.run("unpermute_tokens", rows, weights, places)


def _unpermute_tokens_backward(gradient: Tensor, rows: Tensor, weights: Tensor, places: Tensor) -> Any:
    operator = "unpermute_tokens_backward"
    _check_rows(operator, "rows", rows)
    _check_placed(operator, rows, weights, places)
    wanted = (len(places), rows.shape[1])
    if gradient.shape != wanted or gradient.dtype != rows.dtype or gradient.device != rows.device:
        raise ValueError(
            f"{operator}: gradient is {describe(gradient)}, not {rows.dtype} {list(wanted)} on {rows.device}"
        )
    return FAMILY.run(operator, gradient, rows, weights, places)


def _check_rows(operator: str, name: str, rows: Tensor) -> None:
    check_floating(operator, name, rows)
    if rows.dim() != 2:
        raise ValueError(f"{operator}: {name} is {describe(rows)}, not [rows, width]")


def _check_places(operator: str, places: Tensor, like: Tensor) -> None:
    """What lies outside is seen on the CPU alone, where nobody waits for it; a kernel does not touch it."""
    if places.dim() != 2 or places.dtype != torch.int64 or places.device != like.device:
        raise ValueError(f"{operator}: places is {describe(places)}, not int64 [tokens, top_k] on {like.device}")
    if places.is_cpu and places.numel() and not 0 <= int(places.min()) <= int(places.max()) < places.numel():
        raise ValueError(f"{operator}: places has numbers that are none of {places.numel()} rows")


def _check_placed(operator: str, rows: Tensor, weights: Tensor | None, places: Tensor) -> None:
    _check_places(operator, places, rows)
    if len(rows) != places.numel():
        raise ValueError(f"{operator}: places is {describe(places)}, for {len(rows)} rows")
    if weights is None:
        return
    fits = weights.shape == places.shape and weights.dtype in (rows.dtype, torch.float32)
    if not fits or weights.device != rows.device:
        wanted = f"{rows.dtype} or torch.float32 {list(places.shape)} on {rows.device}, as places"
        raise ValueError(f"{operator}: weights is {describe(weights)}, not {wanted}")


def _of_sorting(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order = chosen.new_empty(chosen.numel(), dtype=torch.int64)
    places = chosen.new_empty(chosen.shape, dtype=torch.int64)
    return order, places, chosen.new_empty(experts, dtype=torch.int32)


def _save_places(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _of_permuted(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return UNPERMUTE_TOKENS(gradient, None, *ctx.saved_tensors), None


def _save_rows(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    rows, weights, places = inputs
    ctx.save_for_backward(None if weights is None else rows, weights, places)


def _of_unpermuted(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, places = ctx.saved_tensors
    if weights is None:
        return PERMUTE_TOKENS(gradient, places), None, None
    return *UNPERMUTE_TOKENS_BACKWARD(gradient, rows, weights, places), None


SORT_BY_EXPERT = define(
    "sort_by_expert(Tensor chosen, int experts) -> (Tensor, Tensor, Tensor)",
    _sort_by_expert,
    _of_sorting,
    family=SORTING,
)
PERMUTE_TOKENS = define(
    "permute_tokens(Tensor x, Tensor places) -> Tensor",
    _permute_tokens,
    lambda x, places: x.new_empty(places.numel(), x.shape[1]),
    save=_save_places,
    backward=_of_permuted,
    family=FAMILY,
)
UNPERMUTE_TOKENS = define(
    "unpermute_tokens(Tensor rows, Tensor? weights, Tensor places) -> Tensor",
    _unpermute_tokens,
    lambda rows, weights, places: rows.new_empty(places.shape[0], rows.shape[1]),
    save=_save_rows,
    backward=_of_unpermuted,
    family=FAMILY,
)
UNPERMUTE_TOKENS_BACKWARD = define(
    "unpermute_tokens_backward(Tensor gradient, Tensor rows, Tensor weights, Tensor places) -> (Tensor, Tensor)",
    _unpermute_tokens_backward,
    lambda gradient, rows, weights, places: (rows.new_empty(rows.shape), weights.new_empty(weights.shape)),
    family=FAMILY,
)
