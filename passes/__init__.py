"""One file a pass, and the pipeline that runs them."""

from collections.abc import Mapping
from types import MappingProxyType

from graphopt.passes.base import NoOptions, Pass, PassContext, Tier
from graphopt.passes.bucket import Bucket
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.chunk import Chunk
from graphopt.passes.cut import Cut
from graphopt.passes.differentiate import Differentiate
from graphopt.passes.fuse import Fuse
from graphopt.passes.interleave import Interleave
from graphopt.passes.offload import Offload
from graphopt.passes.offload_state import OffloadState
from graphopt.passes.overlap import Overlap
from graphopt.passes.precision import Precision
from graphopt.passes.rematerialize import Rematerialize
from graphopt.passes.schedule import Schedule
from graphopt.passes.split import SplitAlong
from graphopt.passes.state_causal import StateCausal
from graphopt.passes.synchronize_batch_norm import SynchronizeBatchNorm
from graphopt.passes.zero import Zero

_PASSES = (
    Canonicalize,
    StateCausal,
    SynchronizeBatchNorm,
    SplitAlong,
    Chunk,
    Cut,
    Fuse,
    Differentiate,
    Precision,
    Checkpoint,
    Rematerialize,
    Offload,
    Interleave,
    Zero,
    Bucket,
    Schedule,
    OffloadState,
    Overlap,
)
REGISTRY: Mapping[str, type[Pass]] = MappingProxyType({each.name: each for each in _PASSES})

__all__ = ["REGISTRY", "NoOptions", "Pass", "PassContext", "Tier"]
