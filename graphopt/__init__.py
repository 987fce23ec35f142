"""graphopt: a compiler for training PyTorch models on many devices."""

from contextlib import AbstractContextManager

from torch import nn

from graphopt.driver import compile
from graphopt.pipelined import engine_of
from graphopt.errors import (
    CaptureError,
    GraphoptError,
    PassError,
    PlanError,
    RankLostError,
    RankMismatchError,
    VerificationError,
)
from graphopt.plan import Dispatch, Offload, Plan, Precision, Remat, Stages, Tensor, Zero
from graphopt.report import Report
from graphopt.runtime.replicas import check_replicas

__all__ = [
    "CaptureError",
    "Dispatch",
    "GraphoptError",
    "Offload",
    "PassError",
    "Plan",
    "PlanError",
    "Precision",
    "RankLostError",
    "RankMismatchError",
    "Remat",
    "Report",
    "Stages",
    "Tensor",
    "VerificationError",
    "Zero",
    "check_replicas",
    "compile",
    "gathered",
    "no_sync",
    "report",
]


def report(model: nn.Module) -> Report:
    """What the compiler did for the call that `model` ran last (or was compiled for). Raises GraphoptError before."""
    return engine_of(model).last_report()


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside do not reduce: their gradients are added to those of the next one outside."""
    return engine_of(model).no_sync()


def gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, the parameters are whole plain tensors to be read, and calls run uncompiled; all ranks enter together."""
    return engine_of(model).gathered()
