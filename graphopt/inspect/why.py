"""Why a node is what and where it is: the passes behind it, who needs it, what is saved, gathered and released."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from graphopt.inspect.provenance import Changes
from graphopt.inspect.recorder import NodeRecord, Stage
from graphopt.ir import InputKind, ParameterLayout, Phase, Program, facts_of
from graphopt.ir.collectives import collective_of, sources_of, waits_of
from graphopt.ir.copies import COPY_LAUNCHES, COPY_OUT, copy_of
from graphopt.ir.liveness import intervals, storage_of
from graphopt.ir.values import byte_size
from graphopt.sizes import readable_size


def explanations(program: Program, layouts: Mapping[str, ParameterLayout]) -> dict[str, list[str]]:
    """For each node of a final program, by name, why it is what and where it is; its `Lineage` tells the passes.

    layouts: how parameters lie over the ranks.
    """
    explainer = _Explainer(program, layouts)
    return {node.name: list(explainer.sentences(node)) for node in program.graph.nodes if node.op != "output"}


class _Explainer:
    """Sentences about the nodes of one program."""

    def __init__(self, program: Program, layouts: Mapping[str, ParameterLayout]) -> None:
        self._program = program
        self._layouts = layouts
        self._owner = storage_of(program)
        self._position = {node: index for index, node in enumerate(program.graph.nodes)}
        self._at = list(program.graph.nodes)
        self._ends = {interval.owner: interval.last for interval in intervals(program)}
        self._roles = dict(zip(program.placeholders, program.inputs, strict=True))
        self._outputs: defaultdict[fx.Node, list[str]] = defaultdict(list)
        for role, node in zip(program.outputs, program.results, strict=True):
            if node is not None:
                self._outputs[node].append(str(role))

    def sentences(self, node: fx.Node) -> Iterator[str]:
        if node in self._roles:
            yield from self._of_input(node)
        yield from self._of_collective(node)
        yield from self._of_copy(node)
        yield from facts_of(node).reasons
        yield from self._of_saved(node)
        if node in self._outputs:
            yield f"is the program's {', its '.join(self._outputs[node])}"
        yield from self._of_release(node)

    def _of_input(self, node: fx.Node) -> Iterator[str]:
        role = self._roles[node]
        yield f"is given to the program: {role}"
        layout = self._layouts.get(role.name) if role.kind in (InputKind.SHARD, InputKind.PARAMETER) else None
        if layout is None:
            return
        if layout.splits:
            cuts = " and ".join(f"dimension {s.dim}, one of {s.ranks} over {s.axis}" for s in layout.splits)
            yield f"split: of {list(layout.whole_shape)} the program sees {list(layout.shape)}: equal parts of {cuts}"
        if layout.ranks == 1:
            return
        size = readable_size(byte_size(node.meta["val"]))
        if layout.is_whole:
            yield f"stays whole on each of {layout.ranks} ranks: {size}, too small or too short to cut"
        else:
            rows = f"{layout.shard_rows} of {layout.rows} rows of dimension {layout.dim}, {size}"
            yield f"is this rank's part of {list(layout.shape)}: {rows}; one of {layout.ranks} over {layout.axis}"

    def _of_collective(self, node: fx.Node) -> Iterator[str]:
        collective = collective_of(node)
        if collective is None:
            return
        waits = waits_of(node)
        count = len(sources_of(node))
        tensors = "one tensor" if count == 1 else f"{count} tensors"
        size = readable_size(collective.whole_bytes)
        yield f"{collective.kind} of {tensors} over {collective.axis}, {size} when whole"
        if waits:
            between = self._position[waits[0]] - self._position[node] - 1
            yield f"first waited for by {waits[0].name}, {between} nodes later"
            readers = [reader for wait in waits for reader in wait.users if reader.op != "output"]
            if readers:
                first = min(readers, key=self._position.__getitem__)
                yield f"first needed by {first.name}{_place(first)}"

    def _of_copy(self, node: fx.Node) -> Iterator[str]:
        if node.target in COPY_LAUNCHES:
            copy = copy_of(node)
            between = self._position[copy.wait] - self._position[node] - 1
            size = readable_size(byte_size(node.meta["val"]))
            yield f"copies {size} {copy.link}; waited for by {copy.wait.name}, {between} nodes later"

    def _of_saved(self, node: fx.Node) -> Iterator[str]:
        """A forward value that backward reads."""
        if node.op != "call_function" or facts_of(node).phase is not Phase.FORWARD:
            return
        readers = [user.name for user in node.users if user.op != "output" and facts_of(user).phase is Phase.BACKWARD]
        if readers:
            owner = self._owner[node]
            size = readable_size(byte_size(node.meta["val"]))
            storage = f", in the storage of {owner.name}" if owner is not node else ""
            place = f" on {copy_of(owner).place}" if owner.target is COPY_OUT else ""
            yield f"saved for backward{place}: {size}{storage}, read by {_listed(readers)}"

    def _of_release(self, node: fx.Node) -> Iterator[str]:
        """Where the bytes of a value become free."""
        owner = self._owner.get(node)
        if owner is None or owner.op != "call_function" or owner not in self._ends:
            return
        facts = facts_of(owner)
        if facts.resident:
            yield "never released: it is kept over steps"
            return
        last = self._ends[owner]
        if last is None:
            if node not in self._outputs:
                yield f"not released in the step: its storage, of {owner.name}, leaves the program"
            return
        reader = self._at[last]
        if reader is not owner:
            yield f"released after {reader.name}{_place(reader)}, the last to read its storage"


class Lineage:
    """The passes behind each node of the last stage."""

    def __init__(self, stages: Sequence[Stage], changes: Sequence[Changes]) -> None:
        self._names = [stage.made_by.text for stage in stages]
        self._identity = [dict(zip((r.name for r in s.nodes), s.identities, strict=True)) for s in stages]
        self._record = [{record.name: record for record in stage.nodes} for stage in stages]
        self._events: defaultdict[int, dict[int, str]] = defaultdict(dict)
        for index, change in enumerate(changes):
            identity = self._identity[index]
            for record, _ in change.made:
                self._events[identity[record.name]][index] = "made"
            for record in change.moved:
                self._events[identity[record.name]][index] = "moved"
            for _, record in change.changed:
                self._events[identity[record.name]][index] = "changed"

    def chain(self, name: str) -> list[tuple[str, str, NodeRecord]]:
        """What happened to the node and to those it stems from, latest first: (pass, event, the node after it)."""
        found: list[tuple[str, str, NodeRecord]] = []
        stage, current = len(self._names) - 1, name
        while stage >= 0 and current in self._identity[stage]:
            events = self._events[self._identity[stage][current]]
            happened = [index for index in events if index <= stage]
            if not happened:
                break
            for index in sorted(happened, reverse=True):
                found.append((self._names[index], events[index], self._record[index][current]))
            first = min(happened)
            origin = self._record[first][current].facts.origin
            if origin is None:
                break
            # Made from a node of the program before this pass, or from one that the pass itself had made.
            stage, current = (first - 1, origin) if first and origin in self._identity[first - 1] else (-1, "")
        return found


def _place(node: fx.Node) -> str:
    module = facts_of(node).module
    return f" in {module}" if module else ""


def _listed(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
