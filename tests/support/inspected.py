"""Inspections of small models, for tests of what is shown of them."""

import math

from graphopt import Plan
from graphopt.cost.hardware import find_hardware
from graphopt.inspect.inspection import Inspection, inspect_model
from tests.support.zoo import ZOO

PLAN = "dp=2,zero=3,zero.bucket_bytes=64KiB"


def inspected(model: str = "llama", plan: str = PLAN) -> Inspection:
    """A model of the zoo under a plan, on the ranks of its mesh."""
    entry, parsed = ZOO[model], Plan.parse(plan)
    resolved = parsed.resolve(math.prod(parsed.mesh.values()))
    return inspect_model(entry.build(), (), entry.batch(), resolved, find_hardware("h100-sxm"))
