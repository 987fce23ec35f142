"""Buffers that a model has under several names, captured as one: export fails where one of several is changed."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

_Place = tuple[nn.Module, str]


class SharedBuffers:
    """What to do with them while `model` is captured as a part of `root`: they are registered with `root` alone."""

    def __init__(self, model: nn.Module, root: nn.Module) -> None:
        names: defaultdict[int, list[str]] = defaultdict(list)
        for name, buffer in model.named_buffers(remove_duplicate=False):
            names[id(buffer)].append(name)
        groups = [group for group in names.values() if len(group) > 1]
        self._root = root
        self._places = {f"shared_buffer_{index}": _places(model, group) for index, group in enumerate(groups)}
        self.names = {target: group[0] for target, group in zip(self._places, groups, strict=True)}

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Registered with the root inside; with the model again afterwards."""
        for target, places in self._places.items():
            owner, attribute = places[0]
            self._root.register_buffer(target, owner._buffers[attribute])
        places = [place for places in self._places.values() for place in places]
        held = {owner: dict(owner._buffers) for owner, _ in places}
        for owner, attribute in places:
            del owner._buffers[attribute]
        try:
            yield
        finally:
            for owner, buffers in held.items():
                owner._buffers.clear()
                owner._buffers.update(buffers)  # in the order they had

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Where the model looks for them, for a call of it; what the root holds then may be another tensor."""
        for target, places in self._places.items():
            for owner, attribute in places:
                owner._buffers[attribute] = self._root._buffers[target]
        try:
            yield
        finally:
            for places in self._places.values():
                for owner, attribute in places:
                    del owner._buffers[attribute]


def _places(model: nn.Module, names: list[str]) -> list[_Place]:
    """Where the names lead to, each place once."""
    found: dict[tuple[int, str], _Place] = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        found.setdefault((id(owner), attribute), (owner, attribute))
    return list(found.values())
