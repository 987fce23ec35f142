"""The memory model of a pipeline beside runs: predicted and measured peaks of each rank."""

import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

import graphopt
from bench.live import Live, state_of
from bench.segments import is_in_segment
from bench.workloads import llama

VOCABULARY, LAYERS, HIDDEN, SEQUENCE, ROWS, WORLD = 512, 4, 64, 64, 8, 4
PLANS = (
    *(f"pp=4,pipeline={schedule}" for schedule in ("gpipe", "1f1b")),
    *(f"pp=2,dp=2,zero={stage},zero.whole_below=0,pipeline=1f1b" for stage in range(4)),
    *(f"pp=2,dp=2,zero={stage},zero.whole_below=0,pipeline=zbv" for stage in (0, 3)),
    "pp=2,dp=2,pipeline=gpipe,remat=full",
    "pp=2,dp=2,pipeline=zbv,remat=selective",
)


def peaks(plans: Sequence[str]) -> list[dict[str, Any]]:
    """For each plan the bytes on each of four ranks, predicted and measured.

    Segments of memory that ranks share are in neither. Raises ProcessRaisedException with the traceback of a rank that
    failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (folder, plans), nprocs=WORLD)
        ranks = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(WORLD)]
    rows = [(plan, rank, *pair) for plan, *found in zip(plans, *ranks, strict=True) for rank, pair in enumerate(found)]
    return [
        {"plan": plan, "rank": rank, "predicted": said, "measured": found, "deviation": said / found - 1}
        for plan, rank, said, found in rows
    ]


def peak_on_this_rank(plan: str) -> tuple[int, int]:
    """Predicted and measured bytes; all ranks of the plan call this together."""
    model = graphopt.compile(llama(LAYERS, HIDDEN, VOCABULARY), f"{plan},pipeline.microbatches={ROWS // 2}")
    ids = torch.randint(VOCABULARY, (ROWS, SEQUENCE), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    for _ in range(2):
        model.train_step(batch)  # type: ignore[operator]
        model.zero_grad()
    known = [tensor for tensor in state_of(model, batch) if tensor.device.type == "cpu"]
    with Live(known, is_elsewhere=is_in_segment) as live:
        model.train_step(batch)  # type: ignore[operator]
    model.zero_grad()
    step = graphopt.report(model).pipeline_memory
    assert step is not None
    return step.peak_bytes, live.most


def _rank(rank: int, folder: str, plans: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = [peak_on_this_rank(plan) for plan in tqdm(plans, desc="plans", disable=rank > 0)]
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive their group
