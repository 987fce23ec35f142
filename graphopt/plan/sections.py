"""The sections of a plan: frozen dataclasses, checked when they are made."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from graphopt.errors import PlanError
from graphopt.plan.checks import (
    Frozen,
    checked_bytes,
    checked_kinds,
    checked_patterns,
    checked_policy,
    require_bool,
    require_choice,
    require_int,
)

_BYTES = {"bytes": True}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PLACES = ("host", "disk")
KINDS = ("column", "row", "whole")
SEARCH = "search"  # in place of the name of a schedule


@dataclass(frozen=True)
class Zero:
    """ZeRO over the data-parallel axis (Rajbhandari et al. 2020).

    stage: 0 shards nothing, 1 optimizer state, 2 also gradients, 3 also parameters.
    bucket_bytes: of whole parameters that one collective moves at most, or text such as ``"8MiB"``; None for those of
        a repeated layer.
    prefetch: buckets gathered ahead of the one in use.
    whole_below: parameters of fewer bytes stay whole on every rank; text such as ``"4KiB"`` will do.
    keep_gathered: what stays gathered between forward and backward in stage 3: nothing, everything (True), or the
        parameters whose names match one of the patterns (as in fnmatch).
    """

    stage: int = 3
    bucket_bytes: int | None = field(default=None, metadata=_BYTES)
    prefetch: int = 1
    whole_below: int = field(default=4096, metadata=_BYTES)
    keep_gathered: bool | tuple[str, ...] = False

    def __post_init__(self) -> None:
        require_int("zero.stage", self.stage, 0, 3)
        if self.bucket_bytes is not None:
            object.__setattr__(self, "bucket_bytes", checked_bytes("zero.bucket_bytes", self.bucket_bytes, 1))
        require_int("zero.prefetch", self.prefetch, 0)
        object.__setattr__(self, "whole_below", checked_bytes("zero.whole_below", self.whole_below, 0))
        object.__setattr__(self, "keep_gathered", checked_patterns("zero.keep_gathered", self.keep_gathered))

    if TYPE_CHECKING:  # what may be written; the fields say what is held

        def __init__(
            self,
            stage: int = 3,
            bucket_bytes: int | str | None = None,
            prefetch: int = 1,
            whole_below: int | str = 4096,
            keep_gathered: bool | str | Sequence[str] = False,
        ) -> None: ...


@dataclass(frozen=True)
class Precision:
    """The dtype in which parameters compute, and that in which gradients are summed; they are stored as they are."""

    compute: str = "bf16"
    reduce: str = "fp32"

    def __post_init__(self) -> None:
        if self.compute in ("fp16", "float16", "half"):
            raise PlanError(
                f"precision.compute={self.compute!r} needs loss scaling, which this version does not have; say 'bf16'"
            )
        require_choice("precision.compute", self.compute, tuple(_DTYPES))
        require_choice("precision.reduce", self.reduce, tuple(_DTYPES))

    @property
    def compute_dtype(self) -> torch.dtype:
        return _DTYPES[self.compute]

    @property
    def reduce_dtype(self) -> torch.dtype:
        return _DTYPES[self.reduce]


@dataclass(frozen=True)
class Remat:
    """What backward computes again in place of saving it (Chen et al. 2016).

    policy: ``"full"`` saves the inputs of each repeated layer alone; ``"selective"`` also what matrix products,
        convolutions and attention give. Or a budget, kept at the least cost in time: bytes that the step may hold at
        its peak on a rank (a whole number, or text such as ``"8GiB"``), or the share of what it saves for backward
        that it may go on saving (from 0.0 to 1.0). Optimizer state is not part of the step.
    keep: patterns of module paths (as in fnmatch) whose values are saved in any case.
    keep_ops: patterns of operators, such as ``aten.mm.*``, whose values are saved in any case.
    """

    policy: str | int | float = field(default="full", metadata=_BYTES)
    keep: tuple[str, ...] = ()
    keep_ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", checked_policy(self.policy))
        for name in ("keep", "keep_ops"):
            patterns = checked_patterns(f"remat.{name}", getattr(self, name))
            if isinstance(patterns, bool):
                raise PlanError(f"remat.{name}={patterns} is no list of patterns; write for instance 'layers.0.*'")
            object.__setattr__(self, name, patterns)

    @property
    def budget(self) -> int | float | None:
        """Bytes (int) or a share (float), if that is what it is."""
        return None if isinstance(self.policy, str) else self.policy

    if TYPE_CHECKING:

        def __init__(
            self, policy: str | int | float = "full", keep: str | Sequence[str] = (), keep_ops: str | Sequence[str] = ()
        ) -> None: ...


@dataclass(frozen=True)
class Offload:
    """What is kept out of the device's memory while nothing computes with it.

    place: ``"host"``, the memory of the CPU, or ``"disk"``, files.
    least_bytes: what is smaller stays; text such as ``"1MiB"`` will do.
    folder: where files go, best on a disk of this machine; None for the system's folder of temporary files.
    activations: whether values that forward saves for backward are. With a budget in `Plan.remat`, those are moved
        that it takes to keep it, else all.
    state: whether parameters (the shards, where there are) and their gradients are. An optimizer's state is where its
        parameters are; `graphopt.offload.DiskAdamW` has files for it.
    """

    place: str = "host"
    least_bytes: int = field(default=1 << 20, metadata=_BYTES)
    folder: str | None = None
    activations: bool = True
    state: bool = False

    def __post_init__(self) -> None:
        require_choice("offload.place", self.place, _PLACES)
        for name in ("activations", "state"):
            require_bool(f"offload.{name}", getattr(self, name))
        object.__setattr__(self, "least_bytes", checked_bytes("offload.least_bytes", self.least_bytes, 0))
        if self.folder is not None:
            if not isinstance(self.folder, (str, os.PathLike)):
                raise PlanError(f"offload.folder={self.folder!r} is no path; write one such as '/scratch'")
            object.__setattr__(self, "folder", os.fspath(self.folder))

    if TYPE_CHECKING:

        def __init__(
            self,
            place: str = "host",
            least_bytes: int | str = 1 << 20,
            folder: str | os.PathLike[str] | None = None,
            activations: bool = True,
            state: bool = False,
        ) -> None: ...


@dataclass(frozen=True)
class Tensor:
    """How layers are split over the tensor-parallel axis (Shoeybi et al. 2019), where the mesh has one.

    sequence: whether activations between the split regions are split as well, along the sequence (Korthikanti et al.
        2022).
    patterns: of module names (as in fnmatch) -> how products with the module's weights are split: ``"column"``, along
        what they give, ``"row"``, along what they sum over or look up in, or ``"whole"``, not at all. What matches none
        is decided from the graph.
    use_model_plan: whether the plan that a model of Transformers comes with (`tp_plan`) is followed; patterns go first.
    gather_outputs: whether a call returns all that the model does on every rank. If not, what no gradient arrives at
        (logits beside a loss) may come as DTensors in training, over this and the other axes that split layers.
    chunks: equal parts of the batch that are computed in turn between moves over any axis that splits layers, so that
        what one moves travels while another computes; 1 computes all at once.
    """

    sequence: bool = False
    patterns: Mapping[str, str] = field(default_factory=Frozen)
    use_model_plan: bool = True
    gather_outputs: bool = True
    chunks: int = 1

    def __post_init__(self) -> None:
        require_bool("tensor.sequence", self.sequence)
        object.__setattr__(self, "patterns", checked_kinds("tensor.patterns", self.patterns, KINDS))
        require_bool("tensor.use_model_plan", self.use_model_plan)
        require_bool("tensor.gather_outputs", self.gather_outputs)
        require_int("tensor.chunks", self.chunks, 1)

    if TYPE_CHECKING:

        def __init__(
            self,
            sequence: bool = False,
            patterns: Mapping[str, str] | Sequence[str] = ...,
            use_model_plan: bool = True,
            gather_outputs: bool = True,
            chunks: int = 1,
        ) -> None: ...


@dataclass(frozen=True)
class Dispatch:
    """How tokens go to the ranks of ``ep`` that have their experts.

    capacity: for how many rows a rank has room, as a multiple of those that it sends; None for all that there are, so
        that no routing is too uneven. A step in which more go to one rank is an error on all of them.
    """

    capacity: float | None = None

    def __post_init__(self) -> None:
        capacity = self.capacity
        if capacity is None:
            return
        try:
            checked = math.nan if isinstance(capacity, bool) else float(capacity)
        except (TypeError, ValueError):
            checked = math.nan
        if not 1 <= checked < math.inf:
            raise PlanError(f"dispatch.capacity={capacity!r} is no multiple of what a rank sends; the nearest is 1.0")
        object.__setattr__(self, "capacity", checked)

    if TYPE_CHECKING:

        def __init__(self, capacity: float | str | None = None) -> None: ...


@dataclass(frozen=True)
class Stages:
    """How a model is cut into stages over the axis ``pp``, and how a step's microbatches go through them.

    schedule: one of `graphopt.schedules.published.NAMES`, a file that `graphopt.schedules.Schedule` reads, or
        ``"search"`` for one that is made for the stages, from the times that the cost model gives them.
    live: of a search, the most microbatches that a rank keeps alive, those of all its stages together; None for as many
        as it has stages in the whole pipeline.
    microbatches: equal parts of the batch, or all but equal ones, whose gradients are added up. Without ``pp`` they
        follow each other. None: four for each rank of ``pp``.
    stages_per_rank: None for what the schedule is usually run with.
    cuts: paths of modules with which a stage begins, all but the first; none for the cut of least time.
    memory: bytes that a stage may hold of parameters, gradients, optimizer state and saved values, or text such as
        ``"70GiB"``; None for any number.
    send: bytes of a microbatch that may cross one cut, or such text; None for any number.
    gather: when ZeRO 3 gathers the parameters of a stage: for each ``"microbatch"`` anew, or once a ``"step"``, which
        moves fewer bytes and holds them meanwhile.
    outputs: the ranks that `eval_step` gives what the model returns: ``"all"``, or those of the ``"last"`` stage, which
        spares the way back.
    """

    schedule: str = "1f1b"
    microbatches: int | None = None
    stages_per_rank: int | None = None
    live: int | None = None
    cuts: tuple[str, ...] = ()
    memory: int | None = field(default=None, metadata=_BYTES)
    send: int | None = field(default=None, metadata=_BYTES)
    gather: str = "microbatch"
    outputs: str = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, (str, os.PathLike)):
            raise PlanError(f"pipeline.schedule={self.schedule!r} is no name of a schedule; say for instance '1f1b'")
        object.__setattr__(self, "schedule", os.fspath(self.schedule))
        for name in ("microbatches", "stages_per_rank", "live"):
            if getattr(self, name) is not None:
                require_int(f"pipeline.{name}", getattr(self, name), 1)
        if self.live is not None and self.schedule != SEARCH:
            raise PlanError(f"pipeline.live={self.live} is for pipeline.schedule=search, not for {self.schedule}")
        cuts = checked_patterns("pipeline.cuts", self.cuts)
        if isinstance(cuts, bool):
            raise PlanError(f"pipeline.cuts={cuts} is no list of modules; write for instance 'model.layers.2'")
        object.__setattr__(self, "cuts", cuts)
        for name in ("memory", "send"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_bytes(f"pipeline.{name}", getattr(self, name), 1))
        require_choice("pipeline.gather", self.gather, ("microbatch", "step"))
        require_choice("pipeline.outputs", self.outputs, ("all", "last"))

    if TYPE_CHECKING:

        def __init__(
            self,
            schedule: str | os.PathLike[str] = "1f1b",
            microbatches: int | None = None,
            stages_per_rank: int | None = None,
            live: int | None = None,
            cuts: str | Sequence[str] = (),
            memory: int | str | None = None,
            send: int | str | None = None,
            gather: str = "microbatch",
            outputs: str = "all",
        ) -> None: ...
