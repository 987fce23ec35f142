"""AdamW on the CPU beside torch's, interleaved: float32, and float32 masters of bfloat16 parameters and gradients."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bench.statistics import paired_ratios, spread
from bench.workloads import llama
from graphopt.optim import AdamW

Step = Callable[[], Any]


def compare(layers: int, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Seconds a step on the parameters of a Llama 512 wide (9 layers: 32.5 M), for float32 and for bfloat16.

    Each round runs `steps` + 1 steps of every rival in turn; the first of a turn is not counted.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in llama(layers, 512).parameters()]
    found: dict[str, Any] = {"tensors": len(shapes), "elements": sum(shape.numel() for shape in shapes)}
    for name, rivals in (("float32", _float32(shapes)), ("bfloat16", _bfloat16(shapes))):
        times = _measured(rivals, rounds, steps, name)
        found[name] = {
            "seconds": {rival: asdict(spread([t for turn in each for t in turn])) for rival, each in times.items()},
            "ratios": {other: {n: asdict(r) for n, r in paired_ratios(times, other).items()} for other in times},
        }
    torch.set_num_threads(before)
    return found


def _measured(rivals: dict[str, Step], rounds: int, steps: int, name: str) -> dict[str, list[list[float]]]:
    times: dict[str, list[list[float]]] = {rival: [] for rival in rivals}
    for turn in tqdm(range(rounds + 1), desc=name):
        for rival, step in rivals.items():
            taken = _turn(step, steps)
            if turn:
                times[rival].append(taken)
    return times


def _turn(step: Step, steps: int) -> list[float]:
    taken = []
    for index in range(steps + 1):
        started = time.perf_counter()
        step()
        if index:
            taken.append(time.perf_counter() - started)
    return taken


def _float32(shapes: list[torch.Size]) -> dict[str, Step]:
    return {
        "graphopt": AdamW(_parameters(shapes, torch.float32)).step,
        "torch fused": torch.optim.AdamW(_parameters(shapes, torch.float32), fused=True).step,
        "torch foreach": torch.optim.AdamW(_parameters(shapes, torch.float32), foreach=True).step,
    }


def _bfloat16(shapes: list[torch.Size]) -> dict[str, Step]:
    return {
        "graphopt": AdamW(_parameters(shapes, torch.bfloat16)).step,
        "torch fused, casts": _with_casts(_parameters(shapes, torch.bfloat16), fused=True),
        "torch foreach, casts": _with_casts(_parameters(shapes, torch.bfloat16), foreach=True),
    }


def _parameters(shapes: list[torch.Size], dtype: torch.dtype) -> list[nn.Parameter]:
    """Random, each with a random gradient."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    return parameters


def _with_casts(parameters: list[nn.Parameter], **options: bool) -> Step:
    """The same in torch's operators: gradients are cast, masters updated, and copied into the parameters."""
    masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters, **options)

    @torch.no_grad()
    def step() -> None:
        for parameter, master in zip(parameters, masters, strict=True):
            master.grad.copy_(parameter.grad)
        optimizer.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)

    return step
