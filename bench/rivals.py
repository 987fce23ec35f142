"""The rivals: each makes, from the same model, one training step on the same batch with the same optimizer."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Step = Callable[[torch.Tensor], float]


def make_rival(name: str, model: nn.Module) -> Step:
    """The training step of the rival of that name, on its rank's part of the batch."""
    return RIVALS[name](model)


def adamw(module: nn.Module, *, foreach: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0, foreach=foreach)


def plain_step(module: nn.Module, *, foreach: bool = True) -> Step:
    """A step as users write it. foreach: of the optimizer."""
    optimizer = adamw(module, foreach=foreach)

    def step(ids: torch.Tensor) -> float:
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _ddp(model: nn.Module) -> Step:
    return plain_step(nn.parallel.DistributedDataParallel(model))


def _fsdp(model: Any, compiled: bool) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return plain_step(model)


def _graphopt(model: nn.Module, stage: int, transport: str = "auto") -> Step:
    import graphopt

    return plain_step(graphopt.compile(model, graphopt.Plan(zero=stage, transport=transport)))


def _deepspeed(model: nn.Module, stage: int) -> Step:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config, dist_init_required=False)

    def step(ids: torch.Tensor) -> float:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


RIVALS: dict[str, Callable[[nn.Module], Step]] = {
    "ddp": _ddp,
    "fsdp2": lambda model: _fsdp(model, compiled=False),
    "fsdp2-compiled": lambda model: _fsdp(model, compiled=True),
    **{f"graphopt-zero{stage}": lambda model, stage=stage: _graphopt(model, stage) for stage in range(4)},
    **{
        f"graphopt-zero{stage}-gloo": lambda model, stage=stage: _graphopt(model, stage, "group") for stage in (1, 2, 3)
    },
    **{f"deepspeed-zero{stage}": lambda model, stage=stage: _deepspeed(model, stage) for stage in (1, 2, 3)},
}
