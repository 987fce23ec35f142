"""Thousands of drawn examples in one run, in several processes; its seeds are stored, and each can be run again.

python -m tests.equivalence.campaign --examples 2000 --jobs 2
python -m tests.equivalence.campaign --seed 17
python -m tests.equivalence.campaign --failed
"""

import argparse
import functools
import importlib.metadata
import json
import logging
import multiprocessing
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from tqdm import tqdm

from graphopt import Plan
from tests.support.drawn.example import Example
from tests.support.drawn.judge import Results, trained
from tests.support.drawn.script import Train, judge_each_pass, judge_some_steps, subject_of
from tests.support.drawn.strategies import examples
from tests.support.ranks import Ranks

STORE = Path(__file__).parents[2] / "bench" / "results" / "properties.json"
CHUNK = 25
_KINDS = (*["passes"] * 10, *["training alone"] * 5, "training on ranks")  # the last takes five times as long


@dataclass
class Chunk:
    """What came of one seed. counts: how many examples had what; failure: the script of the smallest, if one failed."""

    seed: int
    kind: str
    examples: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


def campaign(examples: int, jobs: int, first_seed: int, store: Path) -> bool:
    """Judge so many examples in `jobs` processes, and write what came of it to `store`; whether none failed."""
    seeds = range(first_seed, first_seed + -(-examples // CHUNK))
    started = time.monotonic()
    chunks: list[Chunk] = []
    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(seeds) * CHUNK, unit="example") as bar,
    ):
        for done in as_completed([pool.submit(run_seed, number) for number in seeds]):
            chunks.append(done.result())
            bar.update(CHUNK)
            bar.set_postfix(failures=sum(chunk.failure is not None for chunk in chunks))
            chunks.sort(key=lambda chunk: chunk.seed)
            store.write_text(json.dumps(_summary(chunks, time.monotonic() - started), indent=1) + "\n")
    return not any(chunk.failure for chunk in chunks)


def run_failed(store: Path) -> bool:
    """Run the seeds that failed again, and write what came of them in place of that; whether none fails now."""
    written = json.loads(store.read_text())
    chunks = [run_seed(each["seed"]) if each["failure"] else Chunk(**each) for each in written["seeds"]]
    store.write_text(json.dumps(_summary(chunks, written["seconds"]), indent=1) + "\n")
    return not any(chunk.failure for chunk in chunks)


def run_seed(number: int) -> Chunk:
    """The examples of one seed, up to the first failure, which is made small."""
    _be_quiet()
    kind = _KINDS[number % len(_KINDS)]
    chunk = Chunk(number, kind)
    counts: Counter[str] = Counter()
    failed = False

    @seed(number)
    @settings(
        max_examples=CHUNK,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(example=_drawn(kind))
    def each(example: Example) -> None:
        nonlocal failed
        try:
            _judge(kind)(example)
        except UnsatisfiedAssumption:
            raise
        except Exception:
            failed = True
            raise
        if not failed:  # what runs after is the failure on its way to being small
            chunk.examples += 1
            counts.update(_features(example))

    try:
        each()
    except Exception as error:
        chunk.failure = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    chunk.counts = dict(sorted(counts.items()))
    return chunk


def _be_quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def _drawn(kind: str) -> st.SearchStrategy[Example]:
    if kind == "training on ranks":
        return examples((2, 2, 3, 4), random=False, whole_batch=False)
    return examples((1,)) if kind == "training alone" else examples()


def _judge(kind: str) -> Callable[[Example], None]:
    if kind == "passes":
        return judge_each_pass
    return judge_some_steps if kind == "training alone" else functools.partial(judge_some_steps, train=on_ranks(_pool))


def on_ranks(pools: Callable[[int], Ranks]) -> Train:
    """Training on running ranks: ``pools(world)`` gives them."""
    return lambda source, coarse, ranks: pools(ranks).run(_train_here, source, coarse)


def _train_here(rank: int, world: int, source: str, coarse: bool) -> Results:
    _be_quiet()
    return trained(subject_of(source, coarse), rank)


@functools.cache
def _pools() -> dict[int, Ranks]:
    return {}


def _pool(world: int) -> Ranks:
    """Running ranks, fresh ones if some ended."""
    if world not in _pools() or not _pools()[world].is_alive:
        _pools()[world] = Ranks(world)
    return _pools()[world]


def _features(example: Example) -> Iterator[str]:
    """What is counted of an example."""
    plan = example.plan
    yield f"ranks {example.ranks}"
    yield f"zero {plan.zero.stage}"
    flags = {
        "tied": example.shared == "weights" or any(layer.tied for layer in example.layers),
        "called again": example.shared == "everything" or any(layer.again for layer in example.layers),
        "frozen": any(layer.frozen for layer in example.layers),
        "random": example.is_random,
        "no rows": example.rows == 0,
        "bf16": plan.precision is not None,
        "dynamic": plan.dynamic is not None,
        "offload": plan.offload is not None if plan.passes is None else "offload" in plan.passes,
        "budget": plan.remat is not None if plan.passes is None else "policy=budget" in plan.passes,
        "budget and a place": _has_budget_and_place(plan),
        "offload of state": plan.offload is not None and plan.offload.state,
        "global batch norm": plan.batch_norm == "global",
        "pipeline of its own": plan.passes is not None,
    }
    yield from (name for name, flag in flags.items() if flag)
    yield from {f"layer: {layer.kind}" for layer in example.layers}
    yield f"ending: {example.ending}"


def _has_budget_and_place(plan: Plan) -> bool:
    """Whether a budget may be kept by having values wait elsewhere."""
    if plan.passes is not None:
        return any("policy=budget" in step and "place=" in step for step in plan.passes.split("}"))
    return plan.remat is not None and plan.offload is not None and plan.offload.activations


def _summary(chunks: list[Chunk], seconds: float) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk.counts)
    return {
        "examples": sum(chunk.examples for chunk in chunks),
        "failures": sum(chunk.failure is not None for chunk in chunks),
        "seconds": round(seconds),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "hypothesis")},
        },
        "counts": dict(sorted(counts.items())),
        "seeds": [asdict(chunk) for chunk in chunks],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="how many to judge")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--first-seed", type=int, default=0, help=f"seed of the first {CHUNK} examples")
    parser.add_argument("--store", type=Path, default=STORE, help="where the results go")
    parser.add_argument("--seed", type=int, help="run the examples of this one seed again, and print what failed")
    parser.add_argument("--failed", action="store_true", help="run the seeds that failed again, and store the results")
    given_ = parser.parse_args()
    if given_.failed:
        return 0 if run_failed(given_.store) else 1
    if given_.seed is None:
        return 0 if campaign(given_.examples, given_.jobs, given_.first_seed, given_.store) else 1
    chunk = run_seed(given_.seed)
    print(chunk.failure or f"{chunk.examples} examples of seed {chunk.seed} ({chunk.kind}) agree")
    return 1 if chunk.failure else 0


if __name__ == "__main__":
    sys.exit(main())
