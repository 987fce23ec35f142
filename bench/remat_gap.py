"""How much more is computed again than must be: graphopt's choices beside the optimum, on real models.

Where the exact integer program (`bench/optimum.py`) is out of reach, on Transformers, they are beside a lower bound of
all choices that compute nothing again twice: memory counts while calls of backward run, and not while copies before
them do.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import highspy
import torch
import transformers as hf
from torch import fx, nn

from bench.optimum import optimum
from bench.remat_sweep import least_budget, seconds_of
from bench.vision import CLASSES, alexnet, mixer, vgg11
from graphopt.cost.memory import memory
from graphopt.cost.transfers import Life
from graphopt.ir import Effect, Phase, Program, effect_of, facts_of
from graphopt.ir.liveness import storage_of
from graphopt.ir.snapshot import copied
from graphopt.lowering import lower
from graphopt.passes.pipeline import PassRecord
from graphopt.plan import Plan

_SCALE = 1e6  # microseconds: what the solver's tolerances are made for
_PATIENCE_SECONDS = 10.0  # the bound is lower if the solver stops early
_SHARES = (0.9, 0.75, 0.5, 0.25, 0.1, 0.0)
_VOCABULARY = 256
_BLOCKS = {"vocab_size": _VOCABULARY, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Gap:
    """A step under a budget. share: of the way from the least budget to none.

    found_seconds: by how much what graphopt computes again makes the step longer; bound_seconds: no choice does by
    less. is_optimum: whether one does by exactly that. step_seconds: of all calls, without a budget.
    """

    model: str
    share: float
    found_seconds: float
    bound_seconds: float
    is_optimum: bool
    step_seconds: float


def gaps() -> list[Gap]:
    """By the times of the cost model."""
    found: list[Gap] = []
    for name, (model, batch) in _convolutions_and_mixer().items():
        found += _gaps(name, model, batch, is_exact=True)
    for name, (model, batch) in _transformers().items():
        found += _gaps(name, model, batch, is_exact=False)
    return found


def _convolutions_and_mixer() -> dict[str, tuple[nn.Module, Batch]]:
    return {
        "alexnet": (alexnet(), _images(128, 224)),
        "vgg11": (vgg11(), _images(32, 224)),
        "mixer": (mixer(side=32, patch=4, width=64, blocks=1), _images(64, 32)),
        "smaller mixer": (mixer(side=32, patch=8, width=32, blocks=1), _images(16, 32)),
    }


def _transformers() -> dict[str, tuple[nn.Module, Batch]]:
    """Of one layer."""
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**_BLOCKS, intermediate_size=168, use_cache=False))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = hf.BertForMaskedLM(hf.BertConfig(**_BLOCKS, **no_dropout, intermediate_size=256))
    ids = torch.randint(_VOCABULARY, (4, 64))
    return {name: (model, {"input_ids": ids, "labels": ids}) for name, model in (("llama", llama), ("bert", bert))}


def _images(rows: int, side: int) -> Batch:
    return {"images": torch.randn(rows, 3, side, side), "labels": torch.randint(CLASSES, (rows,))}


def _gaps(name: str, model: nn.Module, batch: Batch, *, is_exact: bool) -> Iterator[Gap]:
    steps: list[Program] = []

    def keep(record: PassRecord, program: Program) -> None:
        if record.name == "differentiate":
            steps.append(copied(program))

    def lowered(remat: str) -> float:
        plan = Plan.parse(f"dp=1,verify=false{remat}").resolve(1)
        graph = lower(model, (), batch, plan, observer=keep).report.step_graph.graph
        return sum(seconds_of(node) for node in graph.nodes if node.op == "call_function")

    without = lowered("")
    unlimited = memory(steps[0], {"dp": 1})
    floor = least_budget(lambda remat: lowered(f",remat={remat}"))
    for share in _SHARES:
        limit = floor + round(share * (unlimited.peak_bytes - floor))
        found = lowered(f",remat={limit}") - without
        if is_exact:
            best = optimum(steps[0], seconds_of, limit)
            assert best is not None, "what was found fits"
            yield Gap(name, share, found, best.bound_seconds, best.is_proven, without)
        else:
            bound = Bound(steps[0], unlimited.lives).least_seconds(limit)
            yield Gap(name, share, found, bound, found <= bound * (1 + 1e-5), without)


class Bound:
    """Of a step program as differentiation leaves it. Calls of backward are known by their positions."""

    def __init__(self, program: Program, lives: list[Life[int]]) -> None:
        """lives: of everything in the program."""
        owner = storage_of(program)
        backward = [(at, n) for at, n in enumerate(program.graph.nodes) if facts_of(n).phase is Phase.BACKWARD]
        self._allocating = [at for at, n in backward if owner[n] is n and n.target is not operator.getitem]
        self._units = _repeatable(program, owner)
        names = {unit.name: unit for unit in self._units if isinstance(unit.meta["val"], torch.Tensor)}
        self._size = {names[life.owner]: life.size for life in lives if life.owner in names}
        self._sources = {u: {owner[n] for n in u.all_input_nodes} & self._units.keys() for u in self._units}
        self._readers = {
            unit: [at for at, node in backward if any(owner[source] is unit for source in node.all_input_nodes)]
            for unit in self._units
        }
        self._others = {
            at: sum(life.size for life in lives if life.owner not in names and _is_alive(life, at))
            for at, _ in backward
        }
        self._moments = self._needed()

    def least_seconds(self, limit: int) -> float:
        """What every choice that keeps so many bytes computes again at least."""
        model = highspy.Highs()
        model.setOptionValue("output_flag", False)
        model.setOptionValue("time_limit", _PATIENCE_SECONDS)
        saved = {unit: model.addBinary() for unit in self._size}
        copies = {unit: {at: model.addBinary() for at in self._moments[unit]} for unit in self._units}

        def there(unit: fx.Node, at: int) -> Any:
            return saved.get(unit, 0) + sum(copy for moment, copy in copies[unit].items() if moment <= at)

        for unit in self._units:
            if copies[unit]:
                model.addConstr(there(unit, self._moments[unit][-1]) <= 1)
            if self._readers[unit]:
                model.addConstr(there(unit, self._readers[unit][0]) >= 1)
            for source in self._sources[unit]:
                for at, copy in copies[unit].items():
                    model.addConstr(copy <= there(source, at))
        for at, others in self._others.items():
            held = list(self._held(model, copies, there, at))
            if held:
                model.addConstr(sum(size / limit * alive for size, alive in held) <= 1 - others / limit)
        model.minimize(sum(seconds_of(u) * _SCALE * copy for u in self._units for copy in copies[u].values()))
        return float(model.getInfo().mip_dual_bound) / _SCALE

    def _held(
        self, model: highspy.Highs, copies: Mapping[fx.Node, Mapping[int, Any]], there: Any, at: int
    ) -> Iterator[tuple[int, Any]]:
        """Bytes that are alive while the call at a position runs, where a sum of variables is one."""
        for unit, size in self._size.items():
            if self._readers[unit] and self._readers[unit][-1] >= at:
                yield size, there(unit, at)
                continue
            readers = [other for other in self._units if unit in self._sources[other]]
            later = [[copy for moment, copy in copies[other].items() if moment > at] for other in readers]
            if any(later):
                alive = model.addVariable(0, 1)
                for waiting in filter(None, later):
                    model.addConstr(alive >= there(unit, at) + sum(waiting) - 1)
                yield size, alive

    def _needed(self) -> dict[fx.Node, list[int]]:
        """Where copies may be: before what reads them or is computed from them, and before whatever allocates earlier,
        where what they read may still be there."""
        found = {unit: set(self._readers[unit]) for unit in self._units}
        for unit in reversed(self._units):
            for source in self._sources[unit]:
                found[source] |= found[unit]
        return {
            unit: sorted(moments.union(at for at in self._allocating if at < max(moments, default=0)))
            for unit, moments in found.items()
        }


def _repeatable(program: Program, owner: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, None]:
    """Calls of forward that allocate and have no effect, and whose result does not stay in any case; in order."""
    stays = {owner[node] for node in program.results if node is not None}
    found: dict[fx.Node, None] = {}
    for node in program.compute_nodes(Phase.FORWARD):
        is_free = owner[node] is node and node not in stays and effect_of(node) is Effect.PURE
        if is_free and (node.target is not operator.getitem or node.args[0] in found):
            found[node] = None
    return found


def _is_alive(life: Life[int], at: int) -> bool:
    return life.first <= at and (life.last is None or at <= life.last)
