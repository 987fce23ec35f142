"""Arguments and values of nodes as plain JSON values, exact, and back.

What JSON has is itself; anything else is a dict of one key that says what it is: ``{"tuple": [1, 2]}``,
``{"node": "mul_3"}``, ``{"torch": "float32"}``, ``{"size": ["Mul", 4, "s87"]}``.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import fx

from graphopt._torch import FakeTensorMode, without_guards
from graphopt.ir.serialize_symbols import SymbolReader, SymbolWriter

_NAMED = (torch.dtype, torch.layout, torch.memory_format)


class ValueWriter:
    """Values of one program -> JSON. symbols: what must be known of the symbols in them."""

    def __init__(self) -> None:
        self.symbols = SymbolWriter()

    def written(self, value: Any) -> Any:
        """An argument of a node, or a fake value of one, as JSON. Raises ValueError with what cannot be written."""
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, list):
            return [self.written(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self.written(item) for item in value]}
        if isinstance(value, Mapping):
            return {"dict": [[self.written(key), self.written(item)] for key, item in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.written(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, _NAMED):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.SymInt):
            return {"size": self.symbols.size(value)}
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            return {"tensor": self._tensor(value)}
        raise ValueError(f"holds {value!r}, a {type(value).__name__}, which cannot be written")

    def _tensor(self, value: torch.Tensor) -> dict[str, Any]:
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [self.symbols.size(size) for size in value.shape],
            "stride": [self.symbols.size(step) for step in value.stride()],
            "device": str(value.device),
            "requires_grad": value.requires_grad,
        }


class ValueReader:
    """JSON -> values of a fake mode. nodes: those read so far, by name; whoever makes nodes adds to them."""

    def __init__(self, fake_mode: FakeTensorMode, symbols: dict[str, dict[str, Any]]) -> None:
        self.nodes: dict[str, fx.Node] = {}
        self._fake_mode = fake_mode
        self._symbols = SymbolReader(fake_mode, symbols)

    def read(self, written: Any) -> Any:
        """The value that was written. Raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        if isinstance(written, list):
            return [self.read(item) for item in written]
        if not isinstance(written, dict):
            return written
        ((kind, content),) = written.items()
        match kind:
            case "node":
                return self.nodes[content]
            case "tuple":
                return tuple(self.read(item) for item in content)
            case "dict":
                return {self.read(key): self.read(item) for key, item in content}
            case "slice":
                return slice(*map(self.read, content))
            case "float":
                return float(content)
            case "torch":
                return named(content)
            case "device":
                return torch.device(content)
            case "size":
                return self._symbols.symbolic(content)
            case "tensor":
                return self._tensor(content)
        raise ValueError(f"{kind!r} is no kind of value")

    def _tensor(self, content: dict[str, Any]) -> torch.Tensor:
        shape, stride = ([self._symbols.size(size) for size in content[what]] for what in ("shape", "stride"))
        with self._fake_mode, without_guards(self._fake_mode):
            return torch.empty_strided(
                shape,
                stride,
                dtype=named(content["dtype"]),
                device=content["device"],
                requires_grad=content["requires_grad"],
            )


def named(name: str) -> Any:
    """A dtype, layout or memory format by its name in torch."""
    found = getattr(torch, name)
    if not isinstance(found, _NAMED):
        raise ValueError(f"torch.{name} is neither a dtype nor a layout nor a memory format")
    return found


def written_tensor(value: torch.Tensor) -> dict[str, Any]:
    """A real tensor with its elements, exact in every dtype."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "device": str(value.device),
        "bytes": base64.b64encode(raw.numpy().tobytes()).decode(),
    }


def read_tensor(written: dict[str, Any]) -> torch.Tensor:
    """The tensor that `written_tensor` wrote, on its device."""
    value = torch.empty(written["shape"], dtype=named(written["dtype"]))
    raw = numpy.frombuffer(base64.b64decode(written["bytes"]), numpy.uint8)
    value.view(-1).view(torch.uint8).numpy()[:] = raw
    return value.to(written["device"])
