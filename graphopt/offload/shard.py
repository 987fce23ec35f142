"""A parameter's elements on this rank, as an update of one stretch after the other sees them."""

from dataclasses import dataclass
from typing import Self

import torch
from torch.distributed.tensor import DTensor

from graphopt._torch import local_tensor
from graphopt.cuda_ext.adamw import Run, Settings
from graphopt.runtime.files import Part

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"


def rows_of(dtype: torch.dtype) -> tuple[str, ...]:
    """The state that an element of a parameter of `dtype` has on disk, row by row."""
    return MOMENTS if dtype == torch.float32 else (*MOMENTS, MASTER)


@dataclass
class Shard:
    """values: the elements in one dimension, a view where they are contiguous; gradient: likewise, only read.

    is_new: its moments are zeros, whatever is on disk; renews_master: its master is what `values` are.
    """

    parameter: torch.Tensor
    values: torch.Tensor
    gradient: torch.Tensor
    settings: Settings
    is_new: bool
    renews_master: bool

    @classmethod
    def of(cls, name: str, parameter: torch.Tensor, settings: Settings, is_new: bool, renews_master: bool) -> Self:
        """Raises ValueError for a gradient that is sparse, or placed otherwise than its parameter."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise ValueError(f"the gradient of {name!r} is sparse; AdamW wants a dense one")
        if isinstance(parameter, DTensor) and getattr(gradient, "placements", None) != parameter.placements:
            raise ValueError(
                f"{name!r} is placed {parameter.placements}, its gradient otherwise: redistribute it first"
            )
        values, flat = local_tensor(parameter).reshape(-1), local_tensor(gradient).reshape(-1)
        return cls(parameter, values, flat, settings, is_new, renews_master)

    def run(self, part: Part) -> Run:
        """What is to be updated of `part`."""
        if self.is_new:
            part.rows[: len(MOMENTS)].zero_()
        exp_avg, exp_avg_sq, *masters = part.rows
        values, gradient = self.values[part.start : part.stop], self.gradient[part.start : part.stop]
        if not masters:
            return Run(values, gradient, exp_avg, exp_avg_sq)
        if self.renews_master:
            masters[0].copy_(values)
        return Run(masters[0], gradient, exp_avg, exp_avg_sq, values)

    def finish(self) -> None:
        """After the last part: bring the values home if they were not a view."""
        local = local_tensor(self.parameter)
        if not local.is_contiguous():
            local.copy_(self.values.view(local.shape))
