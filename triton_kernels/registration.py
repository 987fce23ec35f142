"""Registers operators of this room with torch: schema, kernels, fake kernel, derivative. And checks of arguments."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from graphopt._torch import OpOverload, is_mutating
from graphopt.triton_kernels.choice import Family

_library = torch.library.Library("graphopt", "FRAGMENT")
_families: dict[OpOverload, Family] = {}


def define(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    family: Family | None = None,
    draws: bool = False,
) -> OpOverload:
    """The operator ``graphopt::name`` that `schema` declares.

    family: what chooses the variant, by the operator's first tensor; reports ask it. draws: whether it takes random
    numbers. compute: on the CPU and on GPUs. save, backward: as for `torch.library.register_autograd`; without them a
    derivative is refused, where torch would only warn and go on without one. What writes an argument can have none.
    """
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag, *([torch.Tag.nondeterministic_seeded] if draws else []))
    _library.define(schema, tags=tags)
    for device in ("CPU", "CUDA"):
        _library.impl(name, compute, device)
    torch.library.register_fake(f"graphopt::{name}", fake, lib=_library)

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"graphopt::{name} has no derivative: second derivatives need GRAPHOPT_KERNELS=off")

    operator: OpOverload = getattr(torch.ops.graphopt, name).default
    if family is not None:
        _families[operator] = family
    if not is_mutating(operator):
        torch.library.register_autograd(f"graphopt::{name}", backward or refuse, setup_context=save, lib=_library)
    return operator


def family_of(operator: object) -> Family | None:
    """What chooses the variant of an operator; None for one that has none."""
    return _families.get(operator)  # type: ignore[call-overload,no-any-return]


def check_same(operator: str, name: str, x: Tensor, like: Tensor) -> None:
    """Raises ValueError unless argument `name` has shape, dtype and device of the operator's first."""
    if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{operator}: {name} is {describe(x)}, not {describe(like)} as the first argument")


def check_row(operator: str, name: str, row: Tensor | None, like: Tensor, width: int | None = None) -> None:
    """Raises ValueError unless argument `name`, if given, is of the first argument's dtype or of float32, and as wide.

    width: of results, where that is not the first argument's.
    """
    if row is None:
        return
    size = like.shape[-1] if width is None else width
    if row.shape != (size,) or row.device != like.device or row.dtype not in (like.dtype, torch.float32):
        of = "the first argument" if width is None else "results"
        wanted = f"{like.dtype} or torch.float32 [{size}] on {like.device}, a row of {of}"
        raise ValueError(f"{operator}: {name} is {describe(row)}, not {wanted}")


def check_floating(operator: str, name: str, x: Tensor, least: int = 1) -> None:
    """Raises ValueError unless argument `name` has floating numbers, and `least` dimensions."""
    if not x.is_floating_point() or x.dim() < least:
        raise ValueError(f"{operator}: {name} is {describe(x)}, not floating with at least {least} dimensions")


def check_bits(operator: str, bits: int, known: Collection[int]) -> None:
    """Raises ValueError unless `bits` are those of a format that is known."""
    if bits not in known:
        raise ValueError(f"{operator}: bits is {bits}, not {' or '.join(map(str, known))}")


def describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
