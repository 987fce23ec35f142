"""What a compilation is compared on: a model, and a call of it on every rank of a mesh."""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.capture.arguments import flatten_call
from graphopt.inspect.exchanges import Values
from graphopt.ir import ParameterLayout
from graphopt.lowering import Compilation
from graphopt.plan import Plan


@dataclass(frozen=True)
class Workload:
    """A model, and a call of it on every rank of a mesh; ranks that differ on axes of the model alone call it alike.

    layouts: how parameters lie over the ranks. data_axis: the axis of the mesh that shards the batch. names: of the
    batch tensors; seeded: which outputs a gradient arrives at; dtype: of the computation, None for the model's own.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mesh: Mapping[str, int]
    layouts: Mapping[str, ParameterLayout]
    data_axis: str
    names: list[str]
    seeded: tuple[bool, ...]
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan, compilation: Compilation
    ) -> "Workload":
        """The call that was compiled under a resolved plan, of a copy of the model."""
        return cls(
            model=copy.deepcopy(model),
            args=args,
            kwargs=kwargs,
            mesh=dict(plan.mesh),
            layouts=compilation.layouts,
            data_axis=plan.data_parallel_axis,
            names=compilation.captured.names,
            seeded=compilation.seeded,
            dtype=plan.precision.compute_dtype if plan.precision is not None else None,
        )

    @property
    def places(self) -> list[dict[str, int]]:
        """Of each rank, its place on each axis."""
        return [
            dict(zip(self.mesh, place, strict=True)) for place in itertools.product(*map(range, self.mesh.values()))
        ]

    @property
    def ranks(self) -> int:
        return len(self.places)

    @property
    def replicas(self) -> int:
        """Ranks of the data axis: the parts of the batch."""
        return self.mesh[self.data_axis]

    @property
    def model_axes(self) -> list[str]:
        """The axes that split what a replica computes."""
        return [axis for axis in self.mesh if axis != self.data_axis]

    def on_ranks(self, values: Values) -> Values:
        """What each rank has of one value for each replica."""
        return [values[place[self.data_axis]] for place in self.places]

    @property
    def epsilon(self) -> float:
        """Of the dtype in which parameters compute."""
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return max((torch.finfo(dtype).eps for dtype in ([self.dtype] if self.dtype else dtypes)), default=0.0)

    def batch(self, replica: int) -> list[torch.Tensor]:
        """The call's tensors, their elements rotated by `replica`, floating ones in the dtype of the computation."""
        tensors, _ = flatten_call(self.args, self.kwargs)
        rotated = [t.detach().reshape(-1).roll(replica).view(t.shape) for t in tensors]
        return [self.computed(t).requires_grad_(o.requires_grad) for t, o in zip(rotated, tensors, strict=True)]

    def computed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the dtype of the computation."""
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor.clone()

    def tangent(self, position: int, like: torch.Tensor) -> torch.Tensor:
        """The gradient that arrives at an output: one for a loss, else numbers that its position decides."""
        if like.dim() == 0:
            return torch.ones_like(like)
        generator = torch.Generator().manual_seed(position)
        return torch.randn(like.shape, generator=generator).to(like.dtype)
