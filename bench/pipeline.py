"""A Llama cut into stages: its steps beside `torch.distributed.pipelining` with stages by hand, by schedule."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining

import graphopt
from bench.rivals import Step, adamw
from bench.train import Contest, measure
from bench.workloads import llama
from graphopt.schedules import Schedule, published

MICROBATCHES, LAYERS, HIDDEN, VOCABULARY, SEQUENCE = 8, 8, 256, 4096, 128
SCHEDULES: dict[str, Any] = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zbv": pipelining.ScheduleZBVZeroBubble,
}
_AGREEMENT = 1e-2  # losses are about 8


def step_times(schedules: list[str], worlds: list[int], rounds: int, steps: int) -> dict[int, dict[str, Any]]:
    """Training steps of a Llama in stages on each number of ranks, rivals interleaved, a contest for each schedule.

    Raises ValueError if the losses of two rivals are apart.
    """
    found: dict[int, dict[str, Any]] = {}
    for world in worlds:
        for schedule in schedules:
            rivals = [f"{kind} {schedule}" for kind in RIVALS]
            times = measure(Contest(_model, _make, _tokens), rivals, world, rounds, steps)
            if max(times["largest_loss_difference"].values()) > _AGREEMENT:
                raise ValueError(f"losses of {schedule} on {world} ranks differ: {times['largest_loss_difference']}")
            found.setdefault(world, {})[schedule] = times
    return found


def _model() -> nn.Module:
    return llama(LAYERS, HIDDEN, VOCABULARY)


def _tokens(step: int, rank: int) -> torch.Tensor:
    """int64 [MICROBATCHES, SEQUENCE], the same on all ranks."""
    return torch.randint(VOCABULARY, (MICROBATCHES, SEQUENCE), generator=torch.Generator().manual_seed(step))


def _make(name: str, model: nn.Module) -> Step:
    kind, _, schedule = name.partition(" ")
    return RIVALS[kind](model, published(schedule, dist.get_world_size(), MICROBATCHES))


def _graphopt(model: nn.Module, schedule: Schedule, cuts: Sequence[str] = (), kernels: str = "off") -> Step:
    pipeline = graphopt.Stages(schedule.name, microbatches=schedule.microbatches, cuts=cuts)
    plan = graphopt.Plan(mesh={"pp": schedule.ranks}, pipeline=pipeline, kernels=kernels)
    ids = _tokens(0, 0)
    compiled = graphopt.compile(model, plan, example_inputs={"input_ids": ids, "labels": ids})
    optimizer = adamw(compiled)

    def step(ids: torch.Tensor) -> float:
        loss = compiled.train_step({"input_ids": ids, "labels": ids})  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def _cut_alike(model: nn.Module, schedule: Schedule) -> Step:
    """Cut where `_torch` is."""
    firsts = [_layers_of(schedule, stage).start for stage in range(1, schedule.stages)]
    return _graphopt(model, schedule, [f"model.layers.{first}" for first in firsts])


def _torch(model: Any, schedule: Schedule) -> Step:
    """As in PyTorch's tutorial of pipelines: each rank builds the modules of its stages; as many layers in each."""
    rank, stages = dist.get_rank(), schedule.stages_of(dist.get_rank())
    modules = nn.ModuleList(_Stage(model, schedule, stage) for stage in stages)
    cpu = torch.device("cpu")
    made = [
        pipelining.PipelineStage(module, stage, schedule.stages, cpu)
        for stage, module in zip(stages, modules, strict=True)
    ]
    runs = SCHEDULES[schedule.name]
    takes_one = issubclass(runs, pipelining.schedules.PipelineScheduleSingle)
    runner = runs(
        made[0] if takes_one else made,
        schedule.microbatches,
        loss_fn=lambda logits, ids: model.loss_function(logits=logits, labels=ids, vocab_size=VOCABULARY),
    )
    optimizer, owner = adamw(modules), schedule.rank_of_stage[-1]

    def step(ids: torch.Tensor) -> float:
        losses: list[torch.Tensor] = []
        inputs = (ids,) if rank == schedule.rank_of_stage[0] else ()
        target = {"target": ids, "losses": losses} if rank == owner else {}
        runner.step(*inputs, return_outputs=False, **target)
        mean = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.broadcast(mean, owner)
        optimizer.step()
        optimizer.zero_grad()
        return float(mean)

    return step


def _layers_of(schedule: Schedule, stage: int) -> range:
    return range(stage * LAYERS // schedule.stages, (stage + 1) * LAYERS // schedule.stages)


class _Stage(nn.Module):
    """Consecutive layers of a Llama, with the embedding in front of the first and the head behind the last."""

    def __init__(self, model: Any, schedule: Schedule, stage: int) -> None:
        super().__init__()
        inner = model.model
        self.embed = inner.embed_tokens if stage == 0 else nn.Identity()
        self.layers = nn.ModuleList(inner.layers[index] for index in _layers_of(schedule, stage))
        self.rotary = inner.rotary_emb
        self.head = nn.Sequential(inner.norm, model.lm_head) if stage == schedule.stages - 1 else nn.Identity()

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """given: ids int64 [rows, length], or what the stage before gives, float32 [rows, length, HIDDEN]."""
        hidden = self.embed(given)
        places = torch.arange(hidden.shape[1])[None]
        positions = self.rotary(hidden, position_ids=places)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=positions, position_ids=places)
        found: torch.Tensor = self.head(hidden)
        return found


RIVALS: dict[str, Callable[[Any, Schedule], Step]] = {
    "torch": _torch,
    "graphopt-cut-alike": _cut_alike,
    "graphopt": _graphopt,
    "graphopt-kernels": functools.partial(_graphopt, kernels="auto"),
}
