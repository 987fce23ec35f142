"""Measure, print a table, store the result as JSON; ``python -m bench --help`` says what there is to measure."""

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import pipeline, pipeline_cut, pipeline_memory
from bench.compile_time import first_steps, giant, growth, verification
from bench.cpu_kernel_cases import CASES as CPU_KERNELS
from bench.cpu_kernel_cases import DTYPES
from bench.cpu_kernels import compare as compare_kernels
from bench.disk import ENGINES, throughput
from bench.machine import description
from bench.memory import PLACES, POLICIES, STAGES, accuracy
from bench.models import DIMENSIONS, MODELS
from bench.offload import beyond_memory
from bench.optimizer import compare
from bench.pipeline_idle import idle_fractions
from bench.remat import half, planner
from bench.remat_gap import gaps
from bench.remat_picture import picture
from bench.remat_sweep import Workload, sweep
from bench.rivals import RIVALS
from bench.split import RIVALS as SPLIT_RIVALS
from bench.split import choosing, layer_bytes, step_times
from bench.statistics import spread
from bench.train import DATA_PARALLEL, measure

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "remat-sweep.svg"
ORDER = ",".join(RIVALS)


def _train(options: argparse.Namespace) -> dict[str, Any]:
    rivals = _named(options.rivals, RIVALS, "rival")
    found = measure(DATA_PARALLEL, rivals, options.world, options.rounds, options.steps)
    _print_steps(found, options.against.split(","))
    return found


def _named(text: str, known: Iterable[str], what: str) -> list[str]:
    """The names that an option gives. Raises SystemExit for one that is not known."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown {what} {unknown[0]}; choose from {', '.join(known)}")
    return names


def _print_steps(found: dict[str, Any], against: list[str]) -> None:
    """Step times of rivals, and their ratios to those of `against`."""
    table = Table("rival", "step ms", "quartiles", *(f"of {name}" for name in against))
    for name, each in found["seconds"].items():
        ratios = [found["ratios"][other][name] if other in found["ratios"] else None for other in against]
        shown = [f"{r['median']:.3f} ({r['low']:.3f}–{r['high']:.3f})" if r else "" for r in ratios]
        table.add_row(name, f"{each['median'] * 1e3:.0f}", f"{each['low'] * 1e3:.0f}–{each['high'] * 1e3:.0f}", *shown)
    for name, why in found["missing"].items():
        table.add_row(name, "missing", why)
    apart = found["largest_loss_difference"]
    Console(width=140).print(table, f"largest difference of a loss from {found['reference']}'s:")
    Console(width=140).print(", ".join(f"{name} {each:.1e}" for name, each in apart.items()))


def _split(options: argparse.Namespace) -> dict[str, Any]:
    parts = _named(options.parts, SPLIT_PARTS, "part")
    return {part: SPLIT_PARTS[part](options) for part in parts}


def _split_steps(options: argparse.Namespace) -> dict[int, Any]:
    rivals, found = _named(options.rivals, SPLIT_RIVALS, "rival"), {}
    for world in map(int, options.worlds.split(",")):
        found[world] = step_times(rivals, world, options.rounds, options.steps)
        Console().print(f"{world} ranks")
        _print_steps(found[world], ["torch-tp"])
    return found


def _split_bytes(options: argparse.Namespace) -> dict[str, Any]:
    found = layer_bytes(ranks=8)
    table = Table("", "collective", "bytes a layer", "of four all-reduces")
    for name in ("weights", "sequence"):
        for kind, sent in found[name].items():
            table.add_row(name, kind, f"{sent:,.0f}", f"{sent / found['megatron']:.4%}")
    Console().print(table, f"four all-reduces (Megatron): {found['megatron']:,.0f}")
    return found


def _split_choice(options: argparse.Namespace) -> dict[int, Any]:
    found = choosing(32, (8, 64), options.choices)
    table = Table("ranks", "classes s", "space s", "choice s", "total s", "quartiles")
    for ranks, parts in found.items():
        total = parts["total"]
        medians = (f"{parts[name]['median']:.2f}" for name in ("classes", "space", "choice", "total"))
        table.add_row(str(ranks), *medians, f"{total['low']:.2f}–{total['high']:.2f}")
    Console().print(table)
    return found


SPLIT_PARTS = {"steps": _split_steps, "bytes": _split_bytes, "choice": _split_choice}


def _compile(options: argparse.Namespace) -> dict[str, Any]:
    seconds = growth((8, 16, 32, 64), options.rounds)
    medians = {depth: asdict(spread(each)) for depth, each in seconds.items()}
    steps, large = first_steps(8), giant()
    table = Table("layers", "seconds", "quartiles", "ratio to half the layers")
    for depth, each in medians.items():
        ratio = f"{each['median'] / medians[depth // 2]['median']:.2f}" if depth // 2 in medians else ""
        table.add_row(str(depth), f"{each['median']:.2f}", f"{each['low']:.2f}–{each['high']:.2f}", ratio)
    Console().print(table, {"first step, 8 layers": steps, "405B shape on 1,024 ranks": large})
    return {"growth": medians, "first_steps": steps, "giant": large}


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    shares = {depth: asdict(spread(each)) for depth, each in verification((8, 64), options.rounds).items()}
    table = Table("layers", "verifier's share of compile time", "quartiles")
    for depth, each in shares.items():
        table.add_row(str(depth), f"{each['median']:.1%}", f"{each['low']:.1%}–{each['high']:.1%}")
    Console().print(table)
    return {"share": shares}


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    policies = [None if policy == "none" else policy for policy in options.policies.split(",")]
    stages = [int(stage) for stage in options.stages.split(",")]
    places = [None if place == "none" else place for place in options.places.split(",")]
    found = accuracy(options.models.split(","), options.sizes.split(","), stages, policies, places)
    table = Table("model", "size", "zero", "remat", "offload", "predicted", "measured", "deviation")
    for row in found["ranks"]:
        numbers = (f"{row['predicted']:,}", f"{row['measured']:,}", f"{row['deviation']:+.4%}")
        table.add_row(row["model"], row["size"], str(row["stage"]), row["remat"] or "", row["offload"] or "", *numbers)
    kernels = Table("model", "size", "predicted", "allocated, operators' workspace included", "deviation")
    for row in found["workspace"]:
        apart = row["predicted"] / row["allocated"] - 1
        kernels.add_row(row["model"], row["size"], f"{row['predicted']:,}", f"{row['allocated']:,}", f"{apart:+.4%}")
    Console(width=140).print(table, kernels, f"from {found['lowest']:+.4%} to {found['highest']:+.4%}")
    return found


def _remat(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in _named(options.parts, REMAT_PARTS, "part"):
        found[part] = REMAT_PARTS[part](options)
    return found


def _remat_sweep(options: argparse.Namespace) -> dict[str, Any]:
    found = sweep(options.points, options.rounds, Workload())
    names = ("share", "budget", "predicted", "measured", "GFLOP", "predicted ms", "step ms", "torch: measured", "GFLOP")
    table = Table(*names)
    for ours, theirs in zip(found["graphopt"], found["torch"], strict=True):
        sizes = (f"{ours[name]:,}" for name in ("limit_bytes", "predicted_bytes", "peak_bytes"))
        seconds = (ours["predicted_seconds"], ours["seconds"]["median"])
        table.add_row(
            f"{ours['share']:.2f}",
            *sizes,
            f"{ours['flops'] / 1e9:.3f}",
            *(f"{each * 1e3:.2f}" for each in seconds),
            f"{theirs['peak_bytes']:,}",
            f"{theirs['flops'] / 1e9:.3f}",
        )
    Console(width=160).print(table, found["violations"])
    PICTURE.write_text(picture(found) + "\n")
    return found


def _remat_planner(options: argparse.Namespace) -> dict[int, float]:
    found = planner(tuple(int(depth) for depth in options.depths.split(",")))
    table = Table("layers", "planner's seconds")
    for depth, seconds in found.items():
        table.add_row(str(depth), f"{seconds:.2f}")
    Console().print(table)
    return found


def _remat_half(options: argparse.Namespace) -> dict[str, Any]:
    found = half(Workload(layers=8, hidden=512, rows=2, length=512, vocabulary=1024), options.rounds)
    table = Table("activations", "peak", "GFLOP", "predicted ms", "step ms", "quartiles")
    for name, each in found["seconds"].items():
        table.add_row(
            name,
            f"{found['peak_bytes'][name]:,}",
            f"{found['flops'][name] / 1e9:.2f}",
            f"{found['predicted_seconds'][name] * 1e3:.1f}",
            f"{each['median'] * 1e3:.0f}",
            f"{each['low'] * 1e3:.0f}–{each['high'] * 1e3:.0f}",
        )
    ratio = found["time_ratio"]
    measured = f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"
    Console().print(table, f"FLOPs {found['added_flops']:+.2%}, predicted time {found['added_predicted_seconds']:+.2%}")
    Console().print(f"measured time of that without: {measured}")
    return found


def _remat_gap(options: argparse.Namespace) -> list[dict[str, Any]]:
    table = Table("model", "share", "computed again µs", "least µs", "which is", "above", "of the step")
    found = gaps()
    for gap in found:
        again, least = gap.found_seconds, gap.bound_seconds
        above = f"{again / least - 1:.2%}" if least else ""
        shown = (f"{again * 1e6:.1f}", f"{least * 1e6:.1f}", "the optimum" if gap.is_optimum else "a bound", above)
        table.add_row(gap.model, f"{gap.share:g}", *shown, f"{(again - least) / gap.step_seconds:.2%}")
    Console(width=140).print(table)
    return [asdict(gap) for gap in found]


REMAT_PARTS = {"sweep": _remat_sweep, "planner": _remat_planner, "half": _remat_half, "gap": _remat_gap}


def _optimizer(options: argparse.Namespace) -> dict[str, Any]:
    found = compare(options.layers, options.rounds, options.steps, options.threads)
    table = Table("dtype", "rival", "step ms", "quartiles", "of torch fused")
    for dtype, fused in (("float32", "torch fused"), ("bfloat16", "torch fused, casts")):
        for name, each in found[dtype]["seconds"].items():
            ratio = found[dtype]["ratios"][fused][name]
            milliseconds = f"{each['median'] * 1e3:.1f}", f"{each['low'] * 1e3:.1f}–{each['high'] * 1e3:.1f}"
            table.add_row(dtype, name, *milliseconds, f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})")
    Console(width=140).print(table, f"{found['elements']:,} elements in {found['tensors']} tensors")
    return found


def _cpu_kernels(options: argparse.Namespace) -> dict[str, Any]:
    kernels = _named(options.kernels, CPU_KERNELS, "kernel")
    found = compare_kernels(kernels, _named(options.dtypes, DTYPES, "dtype"), options.rounds, options.threads)
    table = Table("kernel", "shape", "dtype", "µs", "eager, times ours", "compile, times ours")
    for case in found["cases"]:
        ratios = (case["ratios"][name] for name in ("eager", "compile"))
        shown = [f"{r['median']:.2f} ({r['low']:.2f}–{r['high']:.2f})" for r in ratios]
        median = case["seconds"]["graphopt"]["median"]
        table.add_row(case["kernel"], case["shape"], case["dtype"], f"{median * 1e6:.0f}", *shown)
    means = Table("geometric mean, times ours", *found["means"]["eager"])
    for name, each in found["means"].items():
        means.add_row(name, *(f"{mean:.2f}" for mean in each.values()))
    Console(width=160).print(table, means)
    return found


def _disk(options: argparse.Namespace) -> dict[str, Any]:
    found = throughput(options.folder, options.mib << 20, options.block_mib << 20, options.depth, options.rounds)
    table = Table("direction", "rival", "GB/s", "quartiles", *(f"of fio {engine}" for engine in ENGINES))
    for direction, rivals in found["bytes_per_second"].items():
        for name, each in rivals.items():
            ratios = [found["ratios"][direction][f"fio {engine}"].get(name) for engine in ENGINES]
            shown = [f"{r['median']:.3f} ({r['low']:.3f}–{r['high']:.3f})" if r else "1" for r in ratios]
            spread_of = f"{each['low'] / 1e9:.2f}–{each['high'] / 1e9:.2f}"
            table.add_row(direction, name, f"{each['median'] / 1e9:.2f}", spread_of, *shown)
    Console(width=140).print(table, f"direct I/O: {found['is_direct']}")
    return found


def _offload(options: argparse.Namespace) -> dict[str, Any]:
    found = beyond_memory(options.folder, options.width, options.layers, options.steps, options.chunk_mib << 20)
    table = Table("state", "limit GB", "most GB", "median step s", "ended")
    limits = {
        "in_memory": None,
        "on_disk": "limit_bytes",
        "in_memory_under_the_limit": "limit_bytes",
        "everything_on_disk": "limit_with_everything_on_disk",
    }
    for name, limit in limits.items():
        run, shown = found[name], f"{found[limit] / 1e9:.2f}" if limit else ""
        if "error" in run:
            table.add_row(name, shown, "", "", escape(run["error"]))
        else:
            seconds = f"{spread(run['seconds'][1:]).median:.2f}"
            most, digest = f"{run['data_bytes'] / 1e9:.2f}", run["parameters"][:12]
            table.add_row(name, shown, most, seconds, f"parameters {digest}")
    equal = "equal in every bit" if found["is_bitwise_equal"] else "DIFFERENT"
    Console(width=140).print(table, f"{found['elements']:,} elements; on disk and in memory: {equal}")
    return found


def _pipeline(options: argparse.Namespace) -> dict[str, Any]:
    parts = _named(options.parts, PIPELINE_PARTS, "part")
    return {part: PIPELINE_PARTS[part](options) for part in parts}


def _pipeline_steps(options: argparse.Namespace) -> dict[int, Any]:
    schedules = _named(options.schedules, pipeline.SCHEDULES, "schedule")
    worlds = [int(world) for world in options.worlds.split(",")]
    found = pipeline.step_times(schedules, worlds, options.rounds, options.steps)
    for world, by_schedule in found.items():
        for schedule, times in by_schedule.items():
            Console().print(f"{world} ranks")
            _print_steps(times, [f"torch {schedule}"])
    return found


def _pipeline_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = pipeline_memory.peaks(pipeline_memory.PLANS)
    table = Table("plan", "rank", "predicted", "measured", "deviation")
    for row in found:
        numbers = (f"{row['predicted']:,}", f"{row['measured']:,}", f"{row['deviation']:+.4%}")
        table.add_row(row["plan"], str(row["rank"]), *numbers)
    Console(width=140).print(table)
    return found


def _pipeline_cut(options: argparse.Namespace) -> dict[str, Any]:
    found = pipeline_cut.giant(16, options.cuts)
    seconds, most = found["seconds"], max(found["stage_seconds"])
    Console().print(
        f"405B shape into 16 stages: {seconds['median']:.2f} s ({seconds['low']:.2f}–{seconds['high']:.2f});"
    )
    Console().print(f"the slowest takes {most:.3f} s a microbatch, {found['of_best']:.4f} of the least possible")
    return found


PIPELINE_PARTS = {"steps": _pipeline_steps, "memory": _pipeline_memory, "cut": _pipeline_cut}


def _bubble(options: argparse.Namespace) -> dict[str, Any]:
    worlds = [int(world) for world in options.worlds.split(",")]
    found = idle_fractions(worlds, options.unit_ms / 1e3, options.elements, options.rounds)
    table = Table("schedule", "ranks", "stages", "microbatches", "simulated idle", "idle", "ratio", "of makespan")
    for row in found:
        numbers = (str(row[name]) for name in ("ranks", "stages", "microbatches"))
        ratio, makespan = row["ratio"], row["makespan_ratio"]
        table.add_row(
            row["schedule"],
            *numbers,
            f"{row['simulated_idle']:.4f}",
            f"{row['idle']['median']:.4f}",
            f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})",
            f"{makespan['median']:.4f}",
        )
    Console(width=140).print(table)
    return {"schedules": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="step times of all rivals")
    train.add_argument("--rivals", default=ORDER)
    train.add_argument("--against", default="ddp,fsdp2")
    train.add_argument("--world", type=int, default=2)
    train.add_argument("--rounds", type=int, default=8)
    train.add_argument("--steps", type=int, default=5)
    train.add_argument("--result", default="train", help="the result is stored as results/NAME.json")
    train.set_defaults(run=_train)
    splitting = commands.add_parser("split", help="layers split over ranks")
    splitting.add_argument("--parts", default=",".join(SPLIT_PARTS))
    splitting.add_argument("--rivals", default=",".join(SPLIT_RIVALS))
    splitting.add_argument("--worlds", default="2,4")
    splitting.add_argument("--rounds", type=int, default=6)
    splitting.add_argument("--steps", type=int, default=3)
    splitting.add_argument("--choices", type=int, default=3, help="how often the choice is made")
    splitting.add_argument("--result", default="split")
    splitting.set_defaults(run=_split)
    compiling = commands.add_parser("compile", help="compile times")
    compiling.add_argument("--rounds", type=int, default=3)
    compiling.add_argument("--result", default="compile")
    compiling.set_defaults(run=_compile)
    verifying = commands.add_parser("verify", help="the verifier's share of compile time")
    verifying.add_argument("--rounds", type=int, default=3)
    verifying.add_argument("--result", default="verify")
    verifying.set_defaults(run=_verify)
    remembering = commands.add_parser("memory", help="predicted and measured peaks of memory")
    remembering.add_argument("--models", default=",".join(MODELS))
    remembering.add_argument("--sizes", default=",".join(DIMENSIONS))
    remembering.add_argument("--stages", default=",".join(map(str, STAGES)))
    remembering.add_argument("--policies", default=",".join(policy or "none" for policy in POLICIES))
    remembering.add_argument("--places", default=",".join(place or "none" for place in PLACES))
    remembering.add_argument("--result", default="memory")
    remembering.set_defaults(run=_memory)
    repeating = commands.add_parser("remat", help="rematerialization to a budget")
    repeating.add_argument("--parts", default=",".join(REMAT_PARTS))
    repeating.add_argument("--points", type=int, default=20, help="budgets of the sweep")
    repeating.add_argument("--depths", default="8,16,32,64,126", help="of the planner")
    repeating.add_argument("--rounds", type=int, default=6)
    repeating.add_argument("--result", default="remat")
    repeating.set_defaults(run=_remat)
    updating = commands.add_parser("optimizer", help="AdamW on the CPU beside torch's")
    updating.add_argument("--layers", type=int, default=9)
    updating.add_argument("--rounds", type=int, default=20)
    updating.add_argument("--steps", type=int, default=5)
    updating.add_argument("--threads", type=int, default=os.cpu_count())
    updating.add_argument("--result", default="optimizer")
    updating.set_defaults(run=_optimizer)
    kernels = commands.add_parser("cpu-kernels", help="kernels for the CPU beside torch, eager and compiled")
    kernels.add_argument("--kernels", default=",".join(CPU_KERNELS))
    kernels.add_argument("--dtypes", default=",".join(DTYPES))
    kernels.add_argument("--rounds", type=int, default=10)
    kernels.add_argument("--threads", type=int, default=os.cpu_count())
    kernels.add_argument("--result", default="cpu_kernels")
    kernels.set_defaults(run=_cpu_kernels)
    writing = commands.add_parser("disk", help="throughput of tensors in files beside fio")
    writing.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    writing.add_argument("--mib", type=int, default=1024, help="size of the file")
    writing.add_argument("--block-mib", type=int, default=4)
    writing.add_argument("--depth", type=int, default=8)
    writing.add_argument("--rounds", type=int, default=10)
    writing.add_argument("--result", default="disk")
    writing.set_defaults(run=_disk)
    offloading = commands.add_parser("offload", help="training beyond memory with state on disk")
    offloading.add_argument("--folder", type=Path, default=Path.cwd())
    offloading.add_argument("--width", type=int, default=4096)
    offloading.add_argument("--layers", type=int, default=16)
    offloading.add_argument("--steps", type=int, default=6)
    offloading.add_argument("--chunk-mib", type=int, default=64)
    offloading.add_argument("--result", default="offload")
    offloading.set_defaults(run=_offload)
    idling = commands.add_parser("bubble", help="idle fractions of pipelines whose stages sleep")
    idling.add_argument("--worlds", default="2,4")
    idling.add_argument("--unit-ms", type=float, default=1000, help="of a forward where a rank has one stage")
    idling.add_argument("--elements", type=int, default=100_000, help="float32 that cross between stages")
    idling.add_argument("--rounds", type=int, default=3)
    idling.add_argument("--result", default="bubble")
    idling.set_defaults(run=_bubble)
    cutting = commands.add_parser("pipeline", help="pipelines: steps, peaks of memory, the cut of a giant")
    cutting.add_argument("--parts", default=",".join(PIPELINE_PARTS))
    cutting.add_argument("--schedules", default=",".join(pipeline.SCHEDULES))
    cutting.add_argument("--worlds", default="2,4")
    cutting.add_argument("--rounds", type=int, default=6)
    cutting.add_argument("--steps", type=int, default=3)
    cutting.add_argument("--cuts", type=int, default=3, help="how often the giant is cut")
    cutting.add_argument("--result", default="pipeline")
    cutting.set_defaults(run=_pipeline)
    options = parser.parse_args()
    found = {
        "machine": description(),
        # Not folders: they are those of one machine.
        "options": {k: v for k, v in vars(options).items() if k != "run" and not isinstance(v, Path)},
        **options.run(options),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.result}.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
