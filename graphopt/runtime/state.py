"""What an emitted program reads beside its inputs."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from graphopt._torch import local_tensor
from graphopt.errors import GraphoptError
from graphopt.ir import Input, InputKind, ParameterLayout
from graphopt.nearest import listed
from graphopt.runtime.collectives import Collectives
from graphopt.runtime.copies import Copies
from graphopt.runtime.parameters import Slot, padded_shard
from graphopt.runtime.parts import Parts
from graphopt.runtime.pending import Pending
from graphopt.runtime.resident import Resident


class Runtime:
    """Collectives, resident parameters, copies elsewhere and the model's own tensors, for all programs of one model."""

    def __init__(
        self,
        slots: Mapping[str, Slot],
        collectives: Collectives,
        copies: Copies,
        unloaded: set[str] | None = None,
    ) -> None:
        """unloaded: first names of the parameters and buffers that have no values yet; kept up by what loads them."""
        self.slots = slots
        self.unloaded = set() if unloaded is None else unloaded
        self.layouts: dict[str, ParameterLayout] | None = None
        self.collectives = collectives
        self.parts = Parts(collectives.rank)
        self.resident = Resident({})
        self.copies = copies
        self.calls = 0

    def watching(self) -> AbstractContextManager[None]:
        """For running a program: an OffloadError of one rank is raised on all of them, and says in which call."""
        return self.collectives.alarm.watching(f"call {self.calls} of the model")

    def require_values(self) -> None:
        """Raises GraphoptError if some tensors of the model have none yet."""
        if self.unloaded:
            raise GraphoptError(
                f"{listed(sorted(self.unloaded))} of a model from the meta device have no values yet; say "
                "graphopt.load_weights(model, path), graphopt.init_weights(model) or model.load_state_dict(state)"
            )

    def require_settled(self) -> Mapping[str, ParameterLayout]:
        """How parameters lie. Raises GraphoptError while that is left to the first call."""
        if self.layouts is None:
            raise GraphoptError(
                "where the parameters lie is decided for the first call; give example_inputs to graphopt.compile"
            )
        return self.layouts

    def settle(self, layouts: Mapping[str, ParameterLayout], allocated: Mapping[str, torch.Tensor]) -> None:
        """Parameters lie so from now on. allocated: storage of gathered ones, as `Resident` takes it."""
        self.layouts = dict(layouts)
        self.resident = Resident(allocated)

    def layout_of(self, name: str) -> ParameterLayout:
        """How a parameter lies. No program runs before that is settled."""
        assert self.layouts is not None
        return self.layouts[name]

    def refresh(self, names: Sequence[str], shards: Sequence[torch.Tensor], axis: str) -> Pending:
        """Whole parameters from resident storage, gathered anew if their shards have changed."""
        parameters = [self.slots[name].get() for name in names]
        return self.resident.refresh(names, shards, parameters, self.collectives, axis)

    def value_of(self, role: Input) -> torch.Tensor:
        """The model's tensor that a program's input of kind PARAMETER, SHARD or BUFFER stands for."""
        value = self.slots[role.name].get()
        if role.kind is InputKind.SHARD:
            return padded_shard(local_tensor(value), self.layout_of(role.name))
        return local_tensor(value)
