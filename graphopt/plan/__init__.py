"""What the user asks for."""

from graphopt.plan.plan import Plan
from graphopt.plan.sections import Dispatch, Offload, Precision, Remat, Stages, Tensor, Zero

__all__ = ["Dispatch", "Offload", "Plan", "Precision", "Remat", "Stages", "Tensor", "Zero"]
