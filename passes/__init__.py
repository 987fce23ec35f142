"""One file a pass, and the pipeline that runs them."""

from collections.abc import Mapping
from types import MappingProxyType

from graphopt.passes.base import NoOptions, Pass, PassContext, Tier
from graphopt.passes.bucket import Bucket
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.differentiate import Differentiate
from graphopt.passes.precision import Precision
from graphopt.passes.schedule import Schedule
from graphopt.passes.synchronize_batch_norm import SynchronizeBatchNorm
from graphopt.passes.zero import Zero

REGISTRY: Mapping[str, type[Pass]] = MappingProxyType(
    {p.name: p for p in (Canonicalize, SynchronizeBatchNorm, Differentiate, Precision, Zero, Bucket, Schedule)}
)

__all__ = ["REGISTRY", "NoOptions", "Pass", "PassContext", "Tier"]
