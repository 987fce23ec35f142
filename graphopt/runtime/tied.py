"""Gradients of parameters that several stages of a pipeline have: one parameter, so one gradient, their sum."""

from collections.abc import Mapping, Sequence

import torch

from graphopt.ir import ParameterLayout
from graphopt.runtime.messages import TensorSpec
from graphopt.runtime.peers import Peers


def sum_over_stages(
    gradients: dict[str, torch.Tensor],
    layouts: Mapping[str, ParameterLayout],
    rank_of_stage: Sequence[int],
    rank: int,
    peers: Peers,
    device: torch.device,
) -> None:
    """Replace each gradient of a parameter that other ranks have too by the sum over those, alike in every bit.

    gradients: of this rank, by name, in any dtype; the sums are in that of the stored parameter. layouts: of all
    parameters that are trained. rank: this one, along the pipeline axis. All ranks call this together.
    """
    shared = {name: sorted({rank_of_stage[stage] for stage in layout.stages}) for name, layout in layouts.items()}
    tied = {name: ranks for name, ranks in sorted(shared.items()) if len(ranks) > 1 and rank in ranks}
    for name, ranks in tied.items():
        gradients[name] = _or_zeros(gradients.get(name), layouts[name], device)
        for other in ranks:
            if other != rank:
                peers.send(other, [gradients[name]])
    for name, ranks in tied.items():
        own = gradients[name]
        spec = TensorSpec.of(own)
        parts = [own if other == rank else peers.receive(other, [spec])()[0] for other in ranks]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        gradients[name] = total
    peers.flush()


def _or_zeros(gradient: torch.Tensor | None, layout: ParameterLayout, device: torch.device) -> torch.Tensor:
    """In the dtype of the stored parameter; zeros where the loss does not depend on what a stage makes of it."""
    if gradient is None:
        return torch.zeros(layout.shape, dtype=layout.dtype, device=device)
    return gradient.to(layout.dtype)
