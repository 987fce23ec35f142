"""What a step computes of a batch: the model's call, and the loss of what that returns."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.capture.arguments import CallSpec, flatten_call, tensor_names
from graphopt.errors import GraphoptError

Loss = Callable[[Any, Any], torch.Tensor]
"""(what the model returns, the target) -> a scalar."""


@dataclass(frozen=True)
class StepCall:
    """A call of a model, and of a loss function behind it, if there is one; spec and tensors: all of it, flat."""

    spec: CallSpec
    tensors: list[torch.Tensor]
    loss: Loss | None = None

    @classmethod
    def of(cls, batch: Any, target: Any = None, loss: Loss | None = None) -> "StepCall":
        """The call that a batch stands for.

        batch: as `as_call` takes it. Raises GraphoptError for a target that no loss function takes.
        """
        if target is not None and loss is None:
            raise GraphoptError("there is a target, but no loss that takes it; give graphopt.compile a loss")
        args, kwargs = as_call(batch)
        if loss is None or target is None:
            return cls.plain(args, kwargs)
        tensors, spec = flatten_call((args, kwargs, target), {})
        return cls(spec, tensors, loss)

    @classmethod
    def plain(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "StepCall":
        """The call of the model alone."""
        tensors, spec = flatten_call(args, kwargs)
        return cls(spec, tensors)

    def names(self, forward: Callable[..., Any]) -> list[str]:
        """A name for each tensor, by the parameter of `forward` it arrives at, or ``target``."""
        args, kwargs = self.spec.rebuild(self.tensors)
        if self.loss is None:
            return tensor_names(forward, args, kwargs)
        args, kwargs, target = args
        names = tensor_names(forward, args, kwargs)
        return names + [f"target{name.removeprefix('target')}" for name in tensor_names(_of_target, (target,), {})]

    @property
    def apply(self) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        """(model, args, kwargs of such a call) -> what the model returns, or its loss."""
        return call_model if self.loss is None else functools.partial(_lost, self.loss)

    def run(self, model: nn.Module) -> Any:
        """What the model returns, or its loss."""
        return self.apply(model, *self.spec.rebuild(self.tensors))

    def with_tensors(self, tensors: list[torch.Tensor]) -> "StepCall":
        """The same call of other tensors."""
        return StepCall(self.spec, tensors, self.loss)


def call_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call of a model alone."""
    return model(*args, **kwargs)


def _lost(loss: Loss, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    call_args, call_kwargs, target = args
    return loss(model(*call_args, **call_kwargs), target)


def _of_target(target: Any) -> None:
    """Has the one parameter that a target's tensors are named by."""


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, from a tensor, a tuple, a mapping, or a pair of the last two."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple) and len(batch) == 2:
        positional, keyword = batch
        if isinstance(positional, tuple) and isinstance(keyword, Mapping):
            return positional, dict(keyword)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise GraphoptError(
        f"the arguments are a {type(batch).__name__}; give a tuple of positional arguments, a dict of named ones, or a "
        "pair of both"
    )


def loss_of(output: Any) -> torch.Tensor:
    """The loss among what a model returns: a scalar by itself, the first of a tuple, or by the name ``loss``.

    Raises GraphoptError if there is none.
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    for found in (named, first):
        if isinstance(found, torch.Tensor) and found.dim() == 0 and found.is_floating_point():
            return found
    kind = "tensor that is no scalar" if isinstance(output, torch.Tensor) else f"{type(output).__name__} without a loss"
    raise GraphoptError(
        f"the model returns a {kind}; return a scalar, name it loss, or say "
        "graphopt.compile(..., loss=function) and give train_step a target"
    )
