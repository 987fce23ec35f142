"""Tensors by name in safetensors files or in a torch.distributed.checkpoint folder, of which any part can be read."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from graphopt._torch import local_tensor
from graphopt.errors import GraphoptError

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Wanted:
    """A tensor of the model, plain or distributed, to be filled; slices: where in the whole lies what is here of it."""

    tensor: torch.Tensor
    slices: tuple[slice, ...]


class WeightFiles(Protocol):
    """shapes: of the tensors there are, by name."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, wanted: Mapping[str, Wanted]) -> None:
        """Fill these tensors, by the names they have in the files."""


def open_weights(path: str | Path) -> WeightFiles:
    """The tensors at `path`: a safetensors file, a folder of such, or one of torch.distributed.checkpoint.

    In a folder with ``model.safetensors.index.json`` those files count that it lists. Raises GraphoptError for anything
    else.
    """
    path = Path(path)
    if (path / ".metadata").exists():
        return CheckpointFolder(path)
    if (path / _INDEX).exists():
        places = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return SafetensorsFiles([path / file for file in dict.fromkeys(places.values())])
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or files[0].suffix != ".safetensors" or not files[0].is_file():
        raise GraphoptError(
            f"{path} holds no weights; give a .safetensors file, a folder of such, or one that "
            "torch.distributed.checkpoint has saved"
        )
    return SafetensorsFiles(files)


class SafetensorsFiles:
    """Files of safetensors, of which no two have a tensor of the same name."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._places[name] = path

    def read(self, wanted: Mapping[str, Wanted]) -> None:
        by_file: defaultdict[Path, list[str]] = defaultdict(list)
        for name in wanted:
            by_file[self._places[name]].append(name)
        for path, names in by_file.items():
            with _opened(path) as file:
                for name in names:
                    local, slices = local_tensor(wanted[name].tensor), wanted[name].slices
                    if local.numel():
                        local.copy_(file.get_slice(name)[slices] if slices else file.get_tensor(name))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise GraphoptError(f"{path} needs the package safetensors; install graphopt[safetensors]") from error
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise GraphoptError(f"{path} cannot be read: {error}") from error


class CheckpointFolder:
    """A folder that torch.distributed.checkpoint has saved; each rank reads for itself."""

    def __init__(self, path: Path) -> None:
        self._reader = FileSystemReader(path)
        stored = self._reader.read_metadata().state_dict_metadata
        self.shapes = {name: tuple(it.size) for name, it in stored.items() if isinstance(it, TensorStorageMetadata)}

    def read(self, wanted: Mapping[str, Wanted]) -> None:
        tensors = {name: each.tensor.detach() for name, each in wanted.items()}
        load(tensors, storage_reader=self._reader, no_dist=True)
