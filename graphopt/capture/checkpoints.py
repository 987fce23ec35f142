"""What `forward` computes under `torch.utils.checkpoint`, marked where export would lose it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.traceback import annotate
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction, CheckpointPolicy

from graphopt._torch import SelectiveCheckpoint, selective_checkpoints, without_saved_tensor_hooks

_KEY = "graphopt.checkpoint"
_REPEATED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE, False)
_Hook = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Mark:
    """Of one call in `forward`: which region it belongs to, and operators in it whose results the region saves."""

    region: int
    saved: set[str] = field(default_factory=set)


class MarkCheckpoints(TorchFunctionMode):
    """Annotates each call inside a region with its `Mark`. A region inside another is a part of that one.

    A region is known by its hooks on saved tensors, so that it does not matter through which name it was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[Mark] = []
        self._regions: dict[_Hook, int] = {}
        self._policies: dict[SelectiveCheckpoint, _Policy] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with without_saved_tensor_hooks() as hooks:
            region = next(filter(_is_checkpoint, hooks), None)
        if region is None:
            return function(*args, **(kwargs or {}))
        mark = Mark(self._regions.setdefault(region, len(self._regions)))
        self._marks.append(mark)
        for mode in selective_checkpoints():
            if mode not in self._policies:
                self._policies[mode] = mode.policy_fn = _Policy(mode.policy_fn)
            self._policies[mode].saved = mark.saved
        with annotate({_KEY: len(self._marks) - 1}):
            return function(*args, **(kwargs or {}))

    def mark_of(self, node: fx.Node) -> Mark | None:
        """The mark of the call that `node` was recorded in, if it was inside a region."""
        index = node.meta.get("custom", {}).get(_KEY)
        return None if index is None else self._marks[index]


def _is_checkpoint(hook: _Hook) -> bool:
    return getattr(hook, "__module__", None) == checkpoint.__name__


class _Policy:
    """A policy of a selective checkpoint that notes in `saved` the operators whose results are not computed again."""

    def __init__(self, decide: Callable[..., CheckpointPolicy | bool]) -> None:
        self._decide = decide
        self.saved: set[str] = set()

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | bool:
        decision = self._decide(context, operator, *args, **kwargs)
        if decision not in _REPEATED:
            self.saved.add(str(operator))
        return decision


@contextlib.contextmanager
def without_reentrance() -> Iterator[None]:
    """Inside, ``checkpoint(use_reentrant=True)`` enters the other kind of region, whose gradients can be traced.

    The reentrant one runs forward without autograd, and again during backward, where a trace does not see it.
    """

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
        with torch.no_grad():  # autograd sees nothing of a reentrant region that it does not lead into
            return function(*args)

    CheckpointFunction.apply = staticmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del CheckpointFunction.apply


@contextlib.contextmanager
def without_regions() -> Iterator[None]:
    """Inside, what is under checkpoint is saved as everything else, so that nothing is drawn twice."""
    with without_reentrance(), _SaveAll():
        yield


class _SaveAll(TorchFunctionMode):
    """Lets no hook see what a call saves."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with without_saved_tensor_hooks():
            return function(*args, **(kwargs or {}))
