"""A training run in a process of its own, under a limit of its memory: ``python -m bench.beyond_memory JSON``.

Prints one JSON object: the losses, a digest of the parameters, seconds of each step, most bytes of data. What the limit
forbids ends it with the system's error.
"""

import hashlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt
from graphopt import Offload, Plan
from graphopt.offload import DiskAdamW
from graphopt.optim import AdamW


def data_bytes() -> int:
    """Bytes of this process's own memory, as RLIMIT_DATA counts them."""
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmData")]
    return int(line.split()[1]) * 1024


def train(
    width: int,
    layers: int,
    steps: int,
    folder: str | None,
    chunk_size: int,
    limit: int | None,
    everything: bool = False,
) -> dict[str, Any]:
    """Train a stack of square layers with AdamW; its state in `folder`, or in memory without one.

    limit: bytes of memory, beyond what the process has before there is a model. everything: whether parameters,
    gradients and what is saved for backward are in the folder too; the limit holds from when the model is compiled.
    """
    torch.manual_seed(0)
    before = data_bytes()
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))) if everything else None
    if model is not None:
        plan = Plan(offload=Offload("disk", folder=folder, state=True))
        graphopt.compile(model, plan, example_inputs=(torch.empty(4, width),))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (before + limit, before + limit))
    if model is None:
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    parameters = list(model.parameters())
    lr = 1e-5
    optimizer = DiskAdamW(parameters, folder, lr, chunk_size=chunk_size) if folder else AdamW(parameters, lr)
    losses, seconds, most = [], [], 0
    for step in range(steps):
        started = time.perf_counter()
        batch = torch.randn(4, width, generator=torch.Generator().manual_seed(step))
        loss = model(batch).sub(1).square().mean()
        loss.backward()
        optimizer.step()
        most = max(most, data_bytes() - before)
        optimizer.zero_grad()
        losses.append(loss.item().hex())
        seconds.append(time.perf_counter() - started)
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().numpy().data)
    if isinstance(optimizer, DiskAdamW):
        optimizer.close()
    return {"losses": losses, "parameters": digest.hexdigest(), "seconds": seconds, "data_bytes": most}


if __name__ == "__main__":
    print(json.dumps(train(**json.loads(sys.argv[1]))))
