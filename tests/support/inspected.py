"""Inspections of small models, for tests of what is shown of them."""

from graphopt import Plan
from graphopt.cost.hardware import find_hardware
from graphopt.inspect.inspection import Inspection, inspect_model
from tests.support.zoo import ZOO

PLAN = "dp=2,zero=3,zero.bucket_bytes=64KiB"


def inspected(model: str = "llama", plan: str = PLAN) -> Inspection:
    """A model of the zoo under a plan, on two ranks."""
    entry = ZOO[model]
    hardware = find_hardware("h100-sxm")
    return inspect_model(entry.build(), (), entry.batch(), Plan.parse(plan).resolve(2), hardware)
