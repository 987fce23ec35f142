"""A compiled model whole for a while: plain parameters, calls as they were before it was compiled."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graphopt._torch import compiled_call, install_compiled_call, reparametrized
from graphopt.runtime.state import Runtime


class Whole:
    """is_open: whether the model is whole just now. gather: gives its parameters by name, all ranks together."""

    def __init__(self, model: nn.Module, runtime: Runtime, gather: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self.is_open = False
        self._model = model
        self._runtime = runtime
        self._gather = gather

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Parameters whole and plain until the context ends; within another such context, until that ends."""
        if self.is_open:
            yield
            return
        self._runtime.require_values()
        parameters = self._gather()
        self.is_open = True
        try:
            with reparametrized(self._model, parameters):
                yield
        finally:
            self.is_open = False

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call, hooks included."""
        engine = compiled_call(self._model)
        install_compiled_call(self._model, None)
        try:
            return self._model(*args, **kwargs)
        finally:
            install_compiled_call(self._model, engine)
