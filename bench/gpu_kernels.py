"""Kernels on a GPU: results beside float64, then times beside the rate at which `torch.clone` moves bytes, and rivals.

``python -m bench.gpu_kernels`` needs one CUDA device and takes a few minutes. Rivals are eager, `torch.compile`, an
operator of torch where it has one, and Liger Kernel where it is installed. Shapes are of Llama 3 8B with 8,192 tokens,
of experts those of Mixtral 8x7B, routed as in Qwen3 30B-A3B; those of results have 256 tokens. ``--small`` takes tiny
ones, to try the script, on the CPU too.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench import gpu_optimizers
from graphopt.triton_kernels.activations.op import BIAS_ACTIVATION, GATED
from graphopt.triton_kernels.attention.layouts import bigbird
from graphopt.triton_kernels.attention.masks import pairs, reach
from graphopt.triton_kernels.attention.op import SparseAttention, attention
from graphopt.triton_kernels.cross_entropy.linear import LINEAR_CROSS_ENTROPY
from graphopt.triton_kernels.cross_entropy.op import CROSS_ENTROPY
from graphopt.triton_kernels.cross_entropy.part import CROSS_ENTROPY_PART
from graphopt.triton_kernels.experts.permutation.op import PERMUTE_TOKENS, SORT_BY_EXPERT, UNPERMUTE_TOKENS
from graphopt.triton_kernels.experts.products.op import GROUPED_MM
from graphopt.triton_kernels.experts.routing.op import ROUTE
from graphopt.triton_kernels.norms.op import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from graphopt.triton_kernels.quantization.blocks import reference as blocks
from graphopt.triton_kernels.quantization.blocks.op import DEQUANTIZE_BLOCKS, QUANTIZE_BLOCKS
from graphopt.triton_kernels.quantization.scaled import reference as scaled
from graphopt.triton_kernels.quantization.scaled.op import QUANTIZE_ROWS, SCALED_MM
from graphopt.triton_kernels.quantization.weights.op import DEQUANTIZE_WEIGHT, QUANTIZE_WEIGHT, QUANTIZED_LINEAR
from graphopt.triton_kernels.rotary.op import ROTARY
from graphopt.triton_kernels.softmax.op import SOFTMAX

_EPSILON = 1e-6
_ROUNDS = 20
_FLUSHED = 1 << 28  # bytes written before each call, more than caches hold
_RIVALS = ("eager", "compile", "torch", "liger")
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One computation. ours, theirs: of `inputs`, ours and eager's; liger: the name of Liger's function, if it has one.

    moved: bytes that forward and backward must read and write at least; flops: of forward and of both ways, where it is
    bound by these instead. differentiable: whether it has a backward. torchs: torch's own operator, if it has one.
    """

    name: str
    ours: Function
    theirs: Function
    inputs: tuple[Tensor, ...]
    moved: tuple[int, int]
    liger: Function | None = None
    flops: tuple[int, int] = (0, 0)
    differentiable: bool = True
    torchs: Function | None = None


@dataclass(frozen=True)
class Sizes:
    tokens: int
    width: int
    inner: int
    heads: int
    key_heads: int
    classes: int


LARGE = Sizes(8192, 4096, 14336, 32, 8, 128256)
CHECKED = Sizes(256, 4096, 14336, 32, 8, 128256)
SMALL = Sizes(64, 128, 256, 4, 2, 512)


def cases(at: Sizes, dtype: torch.dtype, device: str) -> list[Case]:
    def real(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def elements(*shape: int) -> int:
        return int(torch.Size(shape).numel() * dtype.itemsize)

    row, wide = elements(at.tokens, at.width), elements(at.tokens, at.inner)
    x, weight, bias = real(at.tokens, at.width), real(at.width), real(at.width)
    gate, up = real(at.tokens, at.inner), real(at.tokens, at.inner)
    targets = torch.randint(at.classes, (at.tokens,), device=device)
    heads = at.heads + at.key_heads
    q, k = (real(1, n, at.tokens, 128) for n in (at.heads, at.key_heads))
    angles = torch.rand(1, at.tokens, 64, device=device)
    turn = (angles.cos().to(dtype), angles.sin().to(dtype))
    whole = tuple(torch.cat([each, each], -1) for each in turn)
    logits, of_logits = real(at.tokens, at.classes), elements(at.tokens, at.classes)
    scales = torch.full((at.tokens,), 1 / at.tokens, device=device)
    classes = real(at.classes, at.width) / at.width**0.5
    options = (-100, 0.0, 0.0)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (at.width,), weight, _EPSILON), total

    def half_turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)

    def turned(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (each.unsqueeze(1) for each in whole)
        return tuple(each * cos + half_turned(each) * sin for each in (q, k))

    mask = real(at.tokens, at.width) < 1

    def drop_add_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        total = x * mask * 1.25 + r
        return F.layer_norm(total, (at.width,), w, b, _EPSILON), total

    def of_part(x: Tensor) -> tuple[Tensor, ...]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        above = wide - wide.detach().amax(-1, keepdim=True)
        return above.exp().sum(-1), wide.gather(-1, targets[:, None])[:, 0]

    liger = _liger()
    return [
        Case(
            "RMSNorm",
            lambda x, w: RMS_NORM(x, w, _EPSILON, 0.0, False)[0],
            lambda x, w: F.rms_norm(x, (at.width,), w, _EPSILON),
            (x, weight),
            (2 * row, 3 * row),
            liger and (lambda x, w: liger.liger_rms_norm(x, w, _EPSILON, in_place=False)),
        ),
        Case(
            "RMSNorm of a sum",
            lambda x, r, w: ADD_RMS_NORM(x, r, w, _EPSILON, 0.0, False)[:2],
            add_norm,
            (x, real(at.tokens, at.width), weight),
            (4 * row, 4 * row),
        ),
        Case(
            "LayerNorm",
            lambda x, w, b: LAYER_NORM(x, w, b, _EPSILON)[0],
            lambda x, w, b: F.layer_norm(x, (at.width,), w, b, _EPSILON),
            (x, weight, bias),
            (2 * row, 3 * row),
            liger and (lambda x, w, b: liger.liger_layer_norm(x, w, b, _EPSILON)),
        ),
        Case(
            "LayerNorm of a sum with dropout",
            lambda x, r, w, b: ADD_LAYER_NORM(x, r, w, b, _EPSILON, mask, 1.25)[:2],
            drop_add_norm,
            (x, real(at.tokens, at.width), weight, bias),
            (4 * row + mask.numel(), 5 * row + mask.numel()),
        ),
        Case(
            "SwiGLU",
            lambda gate, up: GATED(gate, up, "silu"),
            lambda gate, up: F.silu(gate) * up,
            (gate, up),
            (3 * wide, 5 * wide),
            liger and (lambda gate, up: liger.liger_swiglu(gate, up)),
        ),
        Case(
            "GeGLU",
            lambda gate, up: GATED(gate, up, "gelu_tanh"),
            lambda gate, up: F.gelu(gate, approximate="tanh") * up,
            (gate, up),
            (3 * wide, 5 * wide),
            liger and (lambda gate, up: liger.liger_geglu(gate, up)),
        ),
        Case(
            "bias and GELU",
            lambda x, b: BIAS_ACTIVATION(x, b, "gelu"),
            lambda x, b: F.gelu(x + b),
            (gate, real(at.inner)),
            (2 * wide, 3 * wide),
        ),
        Case(
            "rotary",
            lambda q, k: ROTARY(q, k, *turn, False, False),
            turned,
            (q, k),
            (2 * elements(heads, at.tokens, 128),) * 2,
            liger and (lambda q, k: liger.liger_rope(q, k, *whole)),
        ),
        Case(
            "cross-entropy",
            lambda x: CROSS_ENTROPY(x, targets, *options)[0].mean(),
            lambda x: F.cross_entropy(x, targets),
            (logits,),
            (of_logits, 2 * of_logits),
            liger and (lambda x: liger.liger_cross_entropy(x.clone(), targets)),  # it writes over what it is given
        ),
        Case(
            "cross-entropy of a part",
            lambda x: CROSS_ENTROPY_PART(x, targets, False)[1:3],
            of_part,
            (logits,),
            (of_logits, 2 * of_logits),
        ),
        Case(
            "linear cross-entropy",
            lambda x, w: LINEAR_CROSS_ENTROPY(x, w, targets, scales, *options, True, True)[0],
            lambda x, w: F.cross_entropy(x @ w.t(), targets),
            (x, classes),
            (0, 0),
            liger and (lambda x, w: liger.liger_fused_linear_cross_entropy(x, w, targets)),
            flops=(6 * at.tokens * at.width * at.classes,) * 2,
        ),
        *_of_experts(at, real, elements, device),
        *_quantized(at, dtype, device),
        *_softmax_cases(at, real, elements),
        *_attention_cases(at, real, device),
    ]


def _of_experts(at: Sizes, real: Callable[..., Tensor], elements: Callable[..., int], device: str) -> list[Case]:
    """Of 8 experts each token goes to 2; it is routed to 8 of 128."""
    experts, top_k, row = 8, 2, elements(at.tokens, at.width)
    chosen = torch.rand(at.tokens, experts, device=device).topk(top_k).indices
    order, places, ends = SORT_BY_EXPERT(chosen, experts)
    matrices = real(experts, at.inner, at.width) / at.width**0.5
    scores = elements(at.tokens, 128)
    logits = (torch.rand(at.tokens, 128, device=device).argsort(-1) / 32).to(matrices.dtype)  # no two of a token alike
    flops = 2 * at.tokens * top_k * at.width * at.inner

    def routed(x: Tensor) -> Tensor:  # without a sum of one, whose gradient would be zero here
        return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).topk(8).values

    def unpermuted(rows: Tensor, weights: Tensor) -> Tensor:
        return (rows * weights.view(-1)[order, None])[places.view(-1)].view(at.tokens, top_k, at.width).sum(1)

    def by_group(rows: Tensor, matrices: Tensor) -> Tensor:
        starts = [0, *ends.tolist()]
        pairs = zip(starts, starts[1:], matrices, strict=False)
        return torch.cat([rows[start:end] @ matrix.t() for start, end, matrix in pairs])

    return [
        Case(
            "routing",
            lambda x: ROUTE(x, None, 8, "softmax", False, 0.0, 1.0, 1, 1)[0],
            routed,
            (logits,),
            (scores, 2 * scores),
        ),
        Case(
            "tokens by expert",
            lambda x: PERMUTE_TOKENS(x, SORT_BY_EXPERT(chosen, experts)[1]),
            lambda x: x[chosen.view(-1).sort(stable=True).indices // top_k],
            (real(at.tokens, at.width),),
            ((1 + top_k) * row, (1 + top_k) * row),
        ),
        Case(
            "tokens back, weighted",
            lambda rows, weights: UNPERMUTE_TOKENS(rows, weights, places),
            unpermuted,
            (real(at.tokens * top_k, at.width), real(at.tokens, top_k)),
            ((1 + top_k) * row, (1 + 2 * top_k) * row),
        ),
        Case(
            "products by group",
            lambda rows, matrices: GROUPED_MM(rows, matrices.mT, ends),
            by_group,
            (real(at.tokens * top_k, at.width), matrices),
            (0, 0),
            flops=(flops, 3 * flops),
            torchs=(lambda rows, matrices: F.grouped_mm(rows, matrices.mT, offs=ends)),
        ),
    ]


def _quantized(at: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Rivals of products are those with weights of `dtype`; of what is quantized, the reference."""
    x = torch.randn(at.tokens, at.width, device=device).to(dtype)
    weight = torch.randn(at.inner, at.width, device=device) / at.width**0.5
    product = 2 * weight.numel()
    for bits in (8, 4):
        held = QUANTIZE_WEIGHT(weight, bits, 128, False)[:2]
        dense = DEQUANTIZE_WEIGHT(*held, None, bits, dtype)
        for rows, which in ((1, "1 row"), (16, "16 rows"), (64, "64 rows"), (at.tokens, "all rows")):
            few = which != "all rows"
            yield Case(
                f"int{bits} weights, {which}",
                lambda x, held=held, bits=bits: QUANTIZED_LINEAR(x, *held, None, None, bits),
                lambda x, dense=dense: x @ dense.to(x.dtype).t(),
                (x[:rows],),
                (held[0].nbytes, held[0].nbytes) if few else (0, 0),
                flops=(0, 0) if few else (rows * product, 2 * rows * product),
            )
    formats = [torch.int8]
    if device == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
        formats.append(torch.float8_e4m3fn)
    for format in formats:
        of_x, of_weight = QUANTIZE_ROWS(x, format), QUANTIZE_ROWS(weight, format)
        wide = tuple((values.float() * scales[:, None]).to(dtype) for values, scales in (of_x, of_weight))
        yield Case(
            f"product of {format}",
            lambda x, weight, of_x=of_x, of_weight=of_weight: SCALED_MM(*of_x, *of_weight, None, dtype),
            lambda x, weight: x @ weight.t(),
            wide,
            (0, 0),
            flops=(at.tokens * product,) * 2,
            differentiable=False,
        )
        yield Case(
            f"rows to {format}",
            lambda x, format=format: QUANTIZE_ROWS(x, format),
            lambda x, format=format: scaled.quantize_rows(x, format),
            (x,),
            (x.nbytes + x.numel(), 0),
            differentiable=False,
        )
    flat = x.reshape(-1)
    for bits in (8, 4):
        values, scales = QUANTIZE_BLOCKS(flat, bits, 256, None)
        pieces = (values.expand(8, *values.shape).contiguous(), scales.expand(8, -1).contiguous())
        yield Case(
            f"blocks of {bits} bits",
            lambda x, bits=bits: QUANTIZE_BLOCKS(x, bits, 256, None),
            lambda x, bits=bits: blocks.quantize_blocks(x, bits, 256, None),
            (flat,),
            (flat.nbytes + values.nbytes + scales.nbytes, 0),
            differentiable=False,
        )
        yield Case(
            f"sum of 8 pieces of {bits} bits",
            lambda scales, v=pieces[0], bits=bits: DEQUANTIZE_BLOCKS(v, scales.float(), bits, flat.numel(), dtype),
            lambda scales, v=pieces[0], bits=bits: blocks.dequantize_blocks(v, scales, bits, flat.numel(), dtype),
            pieces[1:],
            (flat.nbytes + sum(piece.nbytes for piece in pieces), 0),
            differentiable=False,
        )


def _softmax_cases(at: Sizes, real: Callable[..., Tensor], elements: Callable[..., int]) -> list[Case]:
    """Scores of eager attention, as many as there are logits."""
    columns = min(at.tokens, 4096)
    rows = at.tokens * at.classes // (at.key_heads * columns)
    scores, mask = real(1, at.key_heads, rows, columns), real(1, 1, rows, columns)
    moved, of_mask = elements(at.key_heads, rows, columns), elements(rows, columns)
    liger = _liger()
    return [
        Case(
            "softmax",
            lambda x: SOFTMAX(x, None, 1.0, False, None),
            lambda x: x.softmax(-1),
            (scores,),
            (2 * moved, 3 * moved),
            liger and (lambda x: liger.liger_softmax(x)),
        ),
        Case(
            "softmax with scale and mask",
            lambda x: SOFTMAX(x, mask, 0.125, False, None),
            lambda x: (x * 0.125 + mask.to(x.dtype)).softmax(-1, dtype=_at_least_float(x)).to(x.dtype),
            (scores,),
            (2 * moved + of_mask, 3 * moved),
        ),
    ]


def _attention_cases(at: Sizes, real: Callable[..., Tensor], device: str) -> list[Case]:
    """A quarter of the tokens as a window; four packed sequences; blocks of 64 as BigBird has them."""
    block, width = min(64, at.tokens // 4), 128
    tensors = [real(1, at.tokens, heads, width).transpose(1, 2) for heads in (at.heads, at.key_heads, at.key_heads)]
    layout = bigbird(at.tokens // block, 2, random=2, heads=at.heads)
    window, step = at.tokens // 4, at.tokens // 4
    starts = torch.arange(0, at.tokens + 1, step, device=device)
    place = torch.arange(at.tokens, device=device)
    behind = place[:, None] - place
    near = (behind >= 0) & (behind < window)
    packed = (behind >= 0) & (place[:, None] // step == place // step)
    listed = layout.repeat_interleave(block, 1).repeat_interleave(block, 2).to(device)
    sparse = SparseAttention(layout, block).to(device)
    counts = (
        at.heads * pairs(at.tokens, at.tokens, reach(True, window)),
        at.heads * 4 * pairs(step, step, reach(True, None)),
        int(layout.sum()) * block**2,
    )
    functions = (
        lambda q, k, v: attention(q, k, v, causal=True, window=window),
        lambda q, k, v: attention(q, k, v, causal=True, starts=starts),
        sparse,
    )

    def masked(read: Tensor) -> Function:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=read, enable_gqa=True)

    names = ("attention of a window", "attention of packed sequences", "attention of blocks")
    return [
        Case(name, ours, masked(read), tuple(tensors), (0, 0), flops=(4 * count * width, 14 * count * width))
        for name, ours, read, count in zip(names, functions, (near, packed, listed), counts, strict=True)
    ]


def _at_least_float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _liger() -> Any:
    """Liger Kernel's functions, or None."""
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return None
    return importlib.import_module("liger_kernel.transformers.functional")


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
