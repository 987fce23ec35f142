"""A program folded by phase, module and repeated layer: what a reader can take in at once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from graphopt.inspect.recorder import NodeRecord


@dataclass
class Fold:
    """A module's part of a program. label: its name, or those of all the layers it stands for.

    nodes: those of the module itself, in order. twins: the blocks that it stands for, beside itself.
    """

    label: str
    path: str
    nodes: list[NodeRecord] = field(default_factory=list)
    folds: list["Fold"] = field(default_factory=list)
    twins: list["Fold"] = field(default_factory=list)

    @property
    def alike(self) -> int:
        """How many blocks it stands for."""
        return 1 + len(self.twins)

    def inside(self) -> Iterator[NodeRecord]:
        """Its nodes and those of the modules in it, of one block alone."""
        yield from self.nodes
        for inner in self.folds:
            yield from inner.all_nodes()

    def all_nodes(self) -> Iterator[NodeRecord]:
        """Its nodes and those of the modules in it, of all the blocks that it stands for."""
        for block in (self, *self.twins):
            yield from block.inside()

    @property
    def is_open(self) -> bool:
        """Whether it holds repeated blocks, so that a drawing shows what is in it."""
        return any(inner.alike > 1 or inner.is_open for inner in self.folds)


def fold(nodes: Iterable[NodeRecord], repeats: Sequence[Sequence[str]]) -> list[Fold]:
    """One fold for the inputs, one for each phase, one for the outputs; in them modules by path.

    repeats: blocks that are alike; of each run the first is kept, with the number of those it stands for.
    """
    found: dict[str, Fold] = {}
    others = {path: run for run in repeats for path in run}
    for record in nodes:
        name = f"{record.kind}s" if record.kind != "call" else record.facts.phase.value
        top = found.setdefault(name, Fold(name, ""))
        if record.kind != "call":
            top.nodes.append(record)
        else:
            _inside(top, record.facts.module, others).nodes.append(record)
    for top in found.values():
        top.folds = _merged(top.folds, others)
    order = ("inputs", "forward", "backward", "outputs")
    return [found[name] for name in order if name in found]


def _inside(top: Fold, module: str, others: dict[str, Sequence[str]]) -> Fold:
    """The fold of a module under `top`, made where there is none; a block of a run is one step, whatever its depth."""
    at = top
    for path in _steps(module, others):
        inner = next((each for each in at.folds if each.path == path), None)
        if inner is None:
            inner = Fold(path.removeprefix(f"{at.path}.") if at.path else path, path)
            at.folds.append(inner)
        at = inner
    return at


def _steps(module: str, others: dict[str, Sequence[str]]) -> Iterator[str]:
    parts = module.split(".") if module else []
    paths = [".".join(parts[: index + 1]) for index in range(len(parts))]
    for index, path in enumerate(paths):
        is_list_of_blocks = index + 1 < len(paths) and paths[index + 1] in others
        if not is_list_of_blocks:
            yield path


def _merged(folds: list[Fold], others: dict[str, Sequence[str]]) -> list[Fold]:
    """Folds of one run of blocks as one."""
    kept: dict[str, Fold] = {}
    for inner in folds:
        inner.folds = _merged(inner.folds, others)
        run = others.get(inner.path)
        key = run[0] if run is not None else inner.path
        if key not in kept:
            kept[key] = inner
        else:
            kept[key].twins.append(inner)
    for inner in kept.values():
        if inner.twins:
            inner.label += f" … {inner.twins[-1].path.rpartition('.')[2]}"
    return list(kept.values())
