"""What a pass is."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from graphopt._torch import FakeTensorMode
from graphopt.cost.hardware import PRESETS, Hardware
from graphopt.ir import Level, ParameterLayout, Program


class Tier(enum.Enum):
    """How a pass may change numbers; tests hold it to that."""

    BITWISE = "bitwise"
    REASSOCIATES = "reassociates"
    WHOLE_BATCH = "whole batch"  # ranks compute together what each computed of its part: as eager on all of it


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the program. `statistics` is where it may leave counts for the report.

    mesh: axis name -> number of ranks. data_axis: the one that shards the batch.
    layouts: parameter name -> how it lies over the ranks, as the program stands. Parameters start out split over no
        axis; a pass at the forward level that splits one puts another layout in its place.
    decided: how they lie already, which those passes must come to again; None if that is for them to decide.
    gradient_outputs: names of the user outputs at which a gradient will arrive; none for inference.
    reduce_gradients: False leaves gradients whole and unreduced, as accumulation over microbatches wants them.
    reduce_dtype: dtype in which gradients are summed over ranks; None for that of the stored parameter.
    hardware: what a rank runs on. shared_axes: mesh axes whose ranks exchange through shared memory.
    kernels: how operators with kernels are computed (`graphopt.triton_kernels.choice`); None as the environment says.
    remaining: the passes that will run after this one.
    """

    fake_mode: FakeTensorMode
    mesh: Mapping[str, int]
    layouts: dict[str, ParameterLayout]
    decided: Mapping[str, ParameterLayout] | None = None
    data_axis: str = "dp"
    gradient_outputs: frozenset[str] = frozenset()
    reduce_gradients: bool = True
    reduce_dtype: torch.dtype | None = None
    hardware: Hardware = PRESETS["cpu"]
    shared_axes: frozenset[str] = frozenset()
    kernels: str | None = None
    remaining: tuple["Pass", ...] = ()
    statistics: dict[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class NoOptions:
    """The options of a pass that has none."""


class Pass(ABC):
    """One rewrite of a program.

    name: as written in a textual pipeline.
    Options: a frozen dataclass whose fields are what may stand in braces behind the name.
    level, produces: the level of program it takes and leaves.
    requires: passes that must have run before. conflicts: passes that must not have.
    tier: how it may change numbers.
    keeps_values: every output is computed by the same operations from the same inputs, communication set aside; the
        verifier holds the pass to it.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    level: ClassVar[Level]
    produces: ClassVar[Level]
    requires: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()
    tier: ClassVar[Tier] = Tier.BITWISE
    keeps_values: ClassVar[bool] = False

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> bool:
        """Rewrite `program` in place; return whether it changed."""
