"""The memory of a pipelined step on one rank: what is alive in and between the programs that its schedule runs.

A storage that a program leaves behind lives until the last of the later programs of its microbatch that reads it.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphopt.cost.lives import Around, inputs_of_step, lives_of
from graphopt.cost.sizes import ExampleSizes
from graphopt.cost.transfers import Life
from graphopt.ir import InputKind, Output, OutputKind, Program, facts_of
from graphopt.ir.liveness import own_results, storage_of
from graphopt.ir.values import byte_size
from graphopt.schedules import Action, Work

_Key = tuple[InputKind, str]
_ALWAYS = (InputKind.PARAMETER, InputKind.SHARD, InputKind.BUFFER, InputKind.CONSTANT, InputKind.BATCH)
_BEHIND = {
    Work.FORWARD: (Work.BACKWARD, Work.INPUT_GRADIENT, Work.WEIGHT_GRADIENT),
    Work.INPUT_GRADIENT: (Work.WEIGHT_GRADIENT,),
}


@dataclass(frozen=True)
class PipelineMemory:
    """Bytes on one rank in a step of all microbatches, beside the segments of memory that ranks share.

    peak_bytes: the most; peak_action: in which action of the schedule, such as ``0F3``. resident_bytes: parameters,
    buffers and the batch, throughout. timeline: in order, each action with the bytes alive when it has ended.
    """

    peak_bytes: int
    peak_action: str
    resident_bytes: int
    timeline: list[tuple[str, int]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak_bytes,
            "peak_action": self.peak_action,
            "resident_bytes": self.resident_bytes,
            "timeline": self.timeline,
        }


def pipeline_memory(
    row: Sequence[Action],
    stages: Mapping[int, Mapping[Work, Program]],
    mesh: Mapping[str, int],
    *,
    wanted: Collection[str] = (),
    shared_axes: frozenset[str] = frozenset(),
    batch_bytes: int = 0,
) -> PipelineMemory:
    """Go through the actions of a rank in their order.

    stages: the programs of this rank's stages, each for its work. mesh: axis -> ranks. wanted: names of the model's
    outputs that are kept. shared_axes: those whose ranks exchange through shared memory. batch_bytes: of the whole
    batch.
    """
    sizes = ExampleSizes(mesh)
    parts = {
        stage: {work: _Part(program, mesh, shared_axes) for work, program in programs.items()}
        for stage, programs in stages.items()
    }
    resident: dict[tuple[Any, ...], int] = {}
    for stage, programs in stages.items():
        for work, program in programs.items():
            names = {node.name: role for role, node in zip(program.inputs, program.placeholders, strict=True)}
            for life in inputs_of_step(program, sizes):
                role = names[life.owner]
                if role.kind in _ALWAYS and role.kind is not InputKind.BATCH:
                    resident[role.kind, role.name] = life.size
            resident.update({(stage, life.owner): life.size for life in parts[stage][work].resident})
    rank = _Rank(parts, wanted, sum(resident.values()) + batch_bytes)
    for action in row:
        rank.do(action)
    return PipelineMemory(rank.peak, rank.peak_action, rank.resident, rank.timeline)


@dataclass(eq=False)
class _Storage:
    """holders: how many things it is alive for."""

    size: int
    holders: int = 0


_Result = tuple[Output, _Storage, int, bool]
"""With the bytes of its tensor, and whether nothing else lies in its storage."""


class _Part:
    """A program as the storages that it reads, makes and leaves.

    last_read: by input, the position of the last call that reads its storage; None for none. resident: storages that
    stay between steps. lives: of what its calls allocate. results: each with the input whose storage it lies in, or the
    name of the call that allocates that, with the bytes of its tensor, and whether nothing else lies in that storage.
    """

    def __init__(self, program: Program, mesh: Mapping[str, int], shared_axes: frozenset[str]) -> None:
        owner, own = storage_of(program), own_results(program)
        keys = {node: (role.kind, role.name) for role, node in zip(program.inputs, program.placeholders, strict=True)}
        calls = {node.name: node for node in program.compute_nodes()}
        lives = [
            life
            for life in lives_of(program, mesh, shared_axes, ExampleSizes(mesh), Around())
            if life.owner in calls and life.category != "segments"
        ]
        self.inputs = {keys[node]: byte_size(node.meta["val"]) for node in program.placeholders}
        self.last_read = _last_reads(program, owner, keys)
        self.resident = [life for life in lives if facts_of(calls[life.owner]).resident]
        self.lives = [life for life in lives if not facts_of(calls[life.owner]).resident]
        self.length = len(program.graph.nodes)
        self.results = [
            (role, keys.get(owner[node], owner[node].name), byte_size(node.meta["val"]), node in own)
            for role, node in zip(program.outputs, program.results, strict=True)
            if node is not None
        ]


def _last_reads(
    program: Program, owner: Mapping[fx.Node, fx.Node], keys: Mapping[fx.Node, _Key]
) -> dict[_Key, int | None]:
    found: dict[_Key, int | None] = dict.fromkeys(keys.values())
    returned = {owner[node] for node in program.results if node is not None}
    for position, node in enumerate(program.graph.nodes):
        if node.op == "call_function":
            read = {owner[source] for source in node.all_input_nodes} - returned
            found.update({keys[source]: position for source in read if source in keys})
    return found


class _Rank:
    """What is alive while actions run one after the other."""

    def __init__(self, parts: Mapping[int, Mapping[Work, _Part]], wanted: Collection[str], resident: int) -> None:
        self._parts = parts
        self._wanted = wanted
        self._kept: dict[tuple[int, int], dict[_Key, _Storage]] = {}
        self._passed: dict[tuple[int, int], dict[_Key, _Storage]] = {}
        self._sums: set[tuple[int, str]] = set()
        self._total = self.resident = self.peak = resident
        self.peak_action = "before"
        self.timeline: list[tuple[str, int]] = []
        self._action = "before"

    def do(self, action: Action) -> None:
        self._action = str(action)
        parts, place = self._parts[action.stage], (action.stage, action.microbatch)
        part, kept = parts[action.work], self._kept.setdefault(place, {})
        behind = [parts[work] for work in _BEHIND.get(action.work, ()) if work in parts]
        kept.update(self._arrived(action, [part, *behind]))
        later = {key for each in behind for key in each.inputs}
        results = self._run(part, kept, later)
        for role, storage, size, is_own in results:
            match role.kind:
                case OutputKind.USER if role.name in self._wanted:
                    self._hold(storage)
                case OutputKind.SAVED:
                    kept[InputKind.SAVED, role.name] = self._hold(storage)
                case OutputKind.SENT if action.stage + 1 in self._parts:
                    self._pass(action.stage + 1, action.microbatch, (InputKind.RECEIVED, role.name), storage)
                case OutputKind.RECEIVED_GRADIENT if action.stage - 1 in self._parts:
                    self._pass(action.stage - 1, action.microbatch, (InputKind.TANGENT, role.name), storage)
                case OutputKind.GRADIENT if (action.stage, role.name) not in self._sums:
                    self._sums.add((action.stage, role.name))
                    self._hold(storage if is_own else _Storage(size))
        for _, storage, *_ in results:
            self._release(storage)
        self.timeline.append((str(action), self._total))

    def _arrived(self, action: Action, parts: Sequence[_Part]) -> dict[_Key, _Storage]:
        """What another stage has given for an action: as it is from one on this rank, else a copy."""
        kind = InputKind.RECEIVED if action.work is Work.FORWARD else InputKind.TANGENT
        if action.work is Work.WEIGHT_GRADIENT:
            return {}
        passed = self._passed.pop((action.stage, action.microbatch), {})
        sizes = {key: size for part in parts for key, size in part.inputs.items() if key[0] is kind}
        arrived = {key: passed.pop(key) if key in passed else self._hold(_Storage(size)) for key, size in sizes.items()}
        for storage in passed.values():
            self._release(storage)
        return arrived

    def _pass(self, stage: int, microbatch: int, key: _Key, storage: _Storage) -> None:
        self._passed.setdefault((stage, microbatch), {})[key] = self._hold(storage)

    def _run(self, part: _Part, kept: dict[_Key, _Storage], later: Collection[_Key]) -> list[_Result]:
        """Each result with its storage, which is held for it."""
        given = {key: self._hold(kept[key]) for key in part.inputs if key[0] not in _ALWAYS}
        for key in [key for key in kept if key not in later]:
            self._release(kept.pop(key))
        starts: dict[int, list[Life[int]]] = {}
        for life in part.lives:
            starts.setdefault(life.first, []).append(life)
        ends: Counter[int] = Counter()
        for life in part.lives:
            if life.last is not None:
                ends[life.last] += life.size
        reads: dict[int, list[_Key]] = {}
        for key in given:
            last = part.last_read[key]
            reads.setdefault(part.length if last is None else last, []).append(key)
        left: dict[str, _Storage] = {}
        results: list[_Result] = []
        for position in range(part.length):
            for life in starts.get(position, ()):
                if life.last is None:
                    left[life.owner] = self._hold(_Storage(life.size))
                else:
                    self._count(life.size)
            self._count(-ends[position])
            for key in reads.get(position, ()):
                self._release(given.pop(key))
        for role, source, size, is_own in part.results:
            storage = left.get(source) if isinstance(source, str) else given.get(source)
            results.append((role, self._hold(storage if storage is not None else _Storage(0)), size, is_own))
        for storage in (*left.values(), *given.values()):
            self._release(storage)
        return results

    def _hold(self, storage: _Storage) -> _Storage:
        if not storage.holders:
            self._count(storage.size)
        storage.holders += 1
        return storage

    def _release(self, storage: _Storage) -> None:
        storage.holders -= 1
        if not storage.holders:
            self._count(-storage.size)

    def _count(self, change: int) -> None:
        self._total += change
        if self._total > self.peak:
            self.peak, self.peak_action = self._total, self._action
