"""What an emitted program reads beside its inputs."""

from collections.abc import Mapping, Sequence

import torch

from graphopt._torch import local_tensor
from graphopt.ir import Input, InputKind, ParameterLayout
from graphopt.runtime.collectives import Collectives
from graphopt.runtime.copies import Copies
from graphopt.runtime.parameters import Slot, padded_shard
from graphopt.runtime.pending import Pending
from graphopt.runtime.resident import Resident


class Runtime:
    """Collectives, resident parameters, copies elsewhere and the model's own tensors, for all programs of one model."""

    def __init__(
        self,
        slots: Mapping[str, Slot],
        layouts: Mapping[str, ParameterLayout],
        collectives: Collectives,
        resident: Resident,
        copies: Copies,
    ) -> None:
        self.slots = slots
        self.layouts = layouts
        self.collectives = collectives
        self.resident = resident
        self.copies = copies

    def refresh(self, names: Sequence[str], shards: Sequence[torch.Tensor], axis: str) -> Pending:
        """Whole parameters from resident storage, gathered anew if their shards have changed."""
        parameters = [self.slots[name].get() for name in names]
        return self.resident.refresh(names, shards, parameters, self.collectives, axis)

    def value_of(self, role: Input) -> torch.Tensor:
        """The model's tensor that a program's input of kind PARAMETER, SHARD or BUFFER stands for."""
        value = self.slots[role.name].get()
        if role.kind is InputKind.SHARD:
            return padded_shard(local_tensor(value), self.layouts[role.name])
        return local_tensor(value)
