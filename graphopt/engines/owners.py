"""Which rank of a pipeline has a parameter, and what others get from it."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from graphopt.runtime.parameters import whole_parameter, whole_parameters
from graphopt.runtime.state import Runtime


class Owners:
    """Of each parameter one rank, as this rank of a pipeline sees it. group: of its ranks."""

    def __init__(self, runtime: Runtime, rank_of_stage: Sequence[int], rank: int, group: dist.ProcessGroup) -> None:
        self._runtime = runtime
        self._rank_of_stage = rank_of_stage
        self._rank = rank
        self._group = group

    def is_own(self, name: str) -> bool:
        return self._of(name) == self._rank

    def gathered(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        """All parameters, whole, by name; all ranks call this together."""
        return whole_parameters(model, whole_parameter if self._runtime.layouts is None else self._sent_around)

    def _of(self, name: str) -> int:
        """The first of the ranks that have a parameter."""
        return min(self._rank_of_stage[stage] for stage in self._runtime.layout_of(name).stages)

    def _sent_around(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """All of a parameter, from its rank."""
        if self.is_own(name):
            value = whole_parameter(name, parameter).detach().contiguous()
        else:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._runtime.collectives.device)
        if value.numel():
            dist.broadcast(value, dist.get_global_rank(self._group, self._of(name)), self._group)
        return value
