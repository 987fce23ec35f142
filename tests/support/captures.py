"""One capture for models that are built alike: tests of many plans need not capture the same model under each."""

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from graphopt.capture.arguments import CallSpec
from graphopt.capture.export import Capture, capture
from graphopt.capture.surroundings import Surroundings
from graphopt.ir.snapshot import copied


@contextlib.contextmanager
def captured_once() -> Iterator[None]:
    """Within it, who compiles a call of a model of Transformers that was captured already gets a copy of that.

    Not for tests that change what a model's config and tensors do not tell, or that look at capture itself.
    """
    known: dict[Hashable, Capture] = {}

    def shared(
        model: nn.Module, tensors: list[torch.Tensor], spec: CallSpec, names: list[str], **options: Any
    ) -> Capture:
        if not hasattr(model, "config") or options.get("dynamic") is not None:
            return capture(model, tensors, spec, names, **options)
        surroundings = Surroundings.now("cpu")
        key = (_described(model), tuple(map(_kind, tensors)), spec, *options.values(), surroundings)
        if key not in known:
            known[key] = capture(model, tensors, spec, names, **options)
        found = known[key]
        return dataclasses.replace(found, program=copied(found.program))

    with mock.patch("graphopt.driver.capture", shared):
        yield


def _described(model: nn.Module) -> Hashable:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places = {id(tensor): index for index, (_, tensor) in reversed([*enumerate(tensors)])}  # which are tied
    return (
        repr(model),
        repr(model.config),
        model.config._attn_implementation,
        tuple(module.training for module in model.modules()),
        tuple((name, _kind(tensor), places[id(tensor)]) for name, tensor in tensors),
    )


def _kind(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
