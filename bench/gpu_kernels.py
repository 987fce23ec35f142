"""Kernels on a GPU: results beside float64, then times beside the rate at which `torch.clone` moves bytes, and rivals.

``python -m bench.gpu_kernels`` needs one CUDA device and takes a few minutes. Rivals are eager, `torch.compile`, an
operator of torch where it has one, and Liger Kernel where it is installed. Shapes are of Llama 3 8B with 8,192 tokens,
of experts those of Mixtral 8x7B, routed as in Qwen3 30B-A3B; those of results have 256 tokens. ``--small`` takes tiny
ones, to try the script, on the CPU too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import gpu_optimizers
from bench.gpu_kernel_cases import CHECKED, LARGE, SMALL, Case, Function, Sizes, cases

_ROUNDS = 20
_FLUSHED = 1 << 28  # bytes written before each call, more than caches hold
_RIVALS = ("eager", "compile", "torch", "liger")


def both_ways(
    function: Function, inputs: tuple[Tensor, ...], differentiable: bool = True
) -> Callable[[], tuple[Tensor, ...]]:
    """Results, and gradients of all inputs if there are any, where gradients of the results are `_seed`."""
    leaves = [tensor.detach().requires_grad_(differentiable) for tensor in inputs]

    def forward() -> tuple[Tensor, ...]:
        results = function(*leaves)
        return results if isinstance(results, tuple) else (results,)

    if not differentiable:
        return forward
    seeds = [_seed(each) for each in forward()]

    def step() -> tuple[Tensor, ...]:
        results = forward()
        return *results, *torch.autograd.grad(results, leaves, seeds)

    return step


def _seed(like: Tensor) -> Tensor:
    """From 1 to 1.875 over and over: exact in any dtype; from even ones a softmax has no gradient."""
    return (1 + torch.arange(like.numel(), device=like.device) % 8 / 8).to(like.dtype).view(like.shape)


def error(case: Case) -> float:
    """The largest distance from eager in float64, of each tensor's largest element; the mean loss as any other."""
    found = both_ways(case.ours, case.inputs, case.differentiable)()
    wanted = both_ways(case.theirs, tuple(tensor.double() for tensor in case.inputs), case.differentiable)()
    exact = ((one.detach().double(), other.detach().double()) for one, other in zip(found, wanted, strict=True))
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in exact)


def seconds(call: Callable[[], Any], device: str) -> float:
    """The median of several calls, each after a write that leaves nothing of it in caches."""
    flush = torch.empty(_FLUSHED if device == "cuda" else 1, dtype=torch.uint8, device=device)
    call()
    times = []
    for _ in range(_ROUNDS):
        flush.zero_()
        if device != "cuda":
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measured(case: Case, device: str) -> dict[str, Any]:
    """Seconds of each rival, forward alone and both ways."""
    functions = {"graphopt": case.ours, "eager": case.theirs, "compile": torch.compile(case.theirs, dynamic=False)}
    others = {"torch": case.torchs, "liger": case.liger}
    functions |= {name: function for name, function in others.items() if function is not None}
    found: dict[str, Any] = {}
    for name, function in functions.items():
        with torch.no_grad():
            forward = seconds(lambda function=function: function(*case.inputs), device)  # type: ignore[misc]
        found[name] = {"forward": forward}
        if case.differentiable:
            found[name]["both"] = seconds(both_ways(function, case.inputs), device)
    torch.compiler.reset()
    return found


def _rate_of_clone(device: str) -> float:
    """Bytes a second, read and written."""
    x = torch.empty(_FLUSHED if device == "cpu" else 4 * _FLUSHED, dtype=torch.uint8, device=device)
    return 2 * x.numel() / seconds(x.clone, device)


def _rate_of_products(at: Sizes, dtype: torch.dtype, device: str) -> float:
    """Operations a second of the product that a linear cross-entropy consists of."""
    x, weight = (torch.randn(n, at.width, device=device).to(dtype) for n in (at.tokens, at.classes))
    return 2 * at.tokens * at.width * at.classes / seconds(lambda: x @ weight.t(), device)


def _optimizers(is_small: bool, device: str, clone: float) -> list[dict[str, Any]]:
    """Steps over whole lists of parameters; prints them."""
    table = Table("step", "ms", "share", "error", "fused", "foreach", title="optimizers")
    found = []
    shapes = gpu_optimizers.SMALL if is_small else gpu_optimizers.LARGE
    for case in gpu_optimizers.cases():
        apart, measured = case.error(device), gpu_optimizers.measured(case, shapes, device, seconds)
        found.append({"step": case.name, "error": apart, **measured})
        own, times = measured["seconds"]["graphopt"], measured["seconds"]
        others = (f"{times[n] / own:.2f} x" if n in times else "-" for n in ("fused", "foreach"))
        table.add_row(case.name, f"{own * 1e3:.3f}", f"{measured['moved'] / own / clone:.2f}", f"{apart:.1e}", *others)
    Console(width=140).print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --small tries the script on the CPU")
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, options.dtype)
    checked, timed = (SMALL, SMALL) if options.small else (CHECKED, LARGE)
    errors = {case.name: error(case) for case in cases(checked, dtype, device)}
    clone = _rate_of_clone(device)
    product = _rate_of_products(timed, dtype, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    table = Table("kernel", "way", "ms", "share", "error", *_RIVALS, title=f"{name}, {options.dtype}")
    found = []
    for case in cases(timed, dtype, device):
        apart, times = errors[case.name], measured(case, device)
        found.append({"kernel": case.name, "error": apart, "seconds": times})
        for way, moved, flops in zip(times["graphopt"], (case.moved[0], sum(case.moved)), case.flops, strict=False):
            own = times["graphopt"][way]
            share = f"{moved / own / clone:.2f}" if moved else f"{flops / own / product:.2f} of products"
            others = (f"{times[n][way] / own:.2f} x" if n in times else "-" for n in _RIVALS)
            table.add_row(case.name, way, f"{own * 1e3:.3f}", share, f"{apart:.1e}", *others)
    Console(width=140).print(table)
    steps = _optimizers(options.small, device, clone)
    if options.output:
        about = {"device": name, "dtype": options.dtype, "clone_bytes_per_second": clone, "product_flops": product}
        options.output.write_text(json.dumps({**about, "cases": found, "optimizers": steps}, indent=1))


if __name__ == "__main__":
    main()
