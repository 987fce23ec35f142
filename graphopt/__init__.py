"""graphopt: a compiler for training PyTorch models on many devices."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from graphopt.driver import compile
from graphopt.engines.pipelined import engine_of
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
from graphopt.runtime import initialize, weights
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
    "clip_grad_norm_",
    "compile",
    "gathered",
    "init_weights",
    "load_weights",
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


def load_weights(model: nn.Module, path: str | Path, *, prefix: str | None = None, strict: bool = True) -> None:
    """Load parameters and persistent buffers by name, each rank what lies on it; all ranks call this together.

    path: a safetensors file, a folder of such (a Transformers checkpoint is one), or a folder that
        torch.distributed.checkpoint has saved. Values take the dtypes that the model has.
    prefix: of the model's names in the files; by default what most of them stand behind, as ``model.`` in a
        checkpoint of a model and its optimizer.
    strict: whether files must have every name of the model, one at least of a tied tensor, and no others.
    Raises GraphoptError for names or shapes that do not fit, which it names.
    """
    weights.load_weights(model, engine_of(model).runtime, path, prefix=prefix, strict=strict)


def init_weights(model: nn.Module) -> None:
    """Give parameters and buffers the values that a new model begins with; all ranks call this together.

    Each module with tensors of its own begins by its `reset_parameters` or, in Transformers, by the model's
    `_init_weights`, from random numbers that depend on torch's seed on the first rank and on the module's path: the
    values are the same under every plan. Raises GraphoptError for a module that has no such method, or leaves a tensor
    without a value.
    """
    initialize.init_weights(model, engine_of(model).runtime)


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Scale gradients so that the norm of all of them is at most `max_norm`; all ranks call this together.

    norm_type: p of the p-norm, above 0; inf for the largest absolute value. Returns the norm before, a scalar, the same
    on all ranks: that of the whole model, the stages that lie on other ranks included, each parameter counted once.
    (`torch.nn.utils.clip_grad_norm_` sees the stages of its own rank alone.) Raises GraphoptError for another
    `norm_type`, or, with `error_if_nonfinite`, if the norm is not finite.
    """
    return engine_of(model).clip_grad_norm_(max_norm, norm_type, error_if_nonfinite)
