"""One capture for models that are built alike: tests of many plans need not capture the same model under each."""

import contextlib
import dataclasses
import functools
from collections.abc import Hashable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from graphopt.capture.arguments import CallSpec
from graphopt.capture.export import Capture, capture
from graphopt.capture.surroundings import Surroundings
from graphopt.ir.snapshot import copied

_PLAIN = (bool, int, float, str, torch.dtype, type(None))


@contextlib.contextmanager
def captured_once() -> Iterator[None]:
    """Within it, who compiles a call of a model of Transformers that was captured already gets a copy of that.

    Models are alike whose classes, plain attributes, configs and kinds of tensors are. What is symbolic is captured
    anew, as compiling binds symbols; so are all other models, whose forward may depend on anything.
    """
    known: dict[Hashable, Capture] = {}

    def shared(
        model: nn.Module, tensors: list[torch.Tensor], spec: CallSpec, names: list[str], **options: Any
    ) -> Capture:
        if not hasattr(model, "config") or "forward" in vars(model) or options["dynamic"] is not None:
            return capture(model, tensors, spec, names, **options)
        call = (tuple(map(_kind, tensors)), spec, tuple(names), *options.values(), Surroundings.now("cpu"))
        key = (_described(model), call)
        if key not in known:
            known[key] = capture(model, tensors, spec, names, **options)
        found = known[key]
        return dataclasses.replace(found, program=copied(found.program))

    with mock.patch("graphopt.lowering.call.capture", shared):
        yield


def _described(model: nn.Module) -> Hashable:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places = {id(tensor): index for index, (_, tensor) in enumerate(tensors)}  # the same for tied ones
    modules = tuple((type(module), _attributes(module), _config(module)) for module in model.modules())
    return modules, tuple((name, _kind(tensor), places[id(tensor)]) for name, tensor in tensors)


def _config(module: nn.Module) -> Hashable:
    config = getattr(module, "config", None)
    return None if config is None else (repr(config), _attributes(config))


def _attributes(owner: object) -> Hashable:
    plain = [(name, value) for name, value in vars(owner).items() if isinstance(value, _PLAIN)]
    bound = [(name, repr(value)) for name, value in vars(owner).items() if isinstance(value, functools.partial)]
    return (*plain, *bound)  # the latter say how layers are checkpointed


def _kind(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
