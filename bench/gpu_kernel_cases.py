"""What `bench.gpu_kernels` computes: ours, eager's, Liger's, and the bytes or operations that it takes."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


@dataclass(frozen=True)
class Inputs:
    """What cases are made of."""

    at: Sizes
    dtype: torch.dtype
    device: str

    def real(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def bytes(self, *shape: int) -> int:
        return int(torch.Size(shape).numel() * self.dtype.itemsize)


def cases(at: Sizes, dtype: torch.dtype, device: str) -> list[Case]:
    made = Inputs(at, dtype, device)
    return [
        *_norms(made),
        *_activations(made),
        _rotary(made),
        *_losses(made),
        *_experts(made),
        *_quantized(made),
        *_softmax(made),
        *_attention(made),
    ]


def _norms(made: Inputs) -> list[Case]:
    at, liger = made.at, _liger()
    row = made.bytes(at.tokens, at.width)
    x, residual = made.real(at.tokens, at.width), made.real(at.tokens, at.width)
    weight, bias = made.real(at.width), made.real(at.width)
    mask = made.real(at.tokens, at.width) < 1

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (at.width,), weight, _EPSILON), total

    def drop_add_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        total = x * mask * 1.25 + r
        return F.layer_norm(total, (at.width,), w, b, _EPSILON), total

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
            (x, residual, weight),
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
            (x, residual, weight, bias),
            (4 * row + mask.numel(), 5 * row + mask.numel()),
        ),
    ]


def _activations(made: Inputs) -> list[Case]:
    at, liger = made.at, _liger()
    wide = made.bytes(at.tokens, at.inner)
    gate, up = made.real(at.tokens, at.inner), made.real(at.tokens, at.inner)
    return [
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
            (gate, made.real(at.inner)),
            (2 * wide, 3 * wide),
        ),
    ]


def _rotary(made: Inputs) -> Case:
    at, liger = made.at, _liger()
    q, k = (made.real(1, n, at.tokens, 128) for n in (at.heads, at.key_heads))
    angles = torch.rand(1, at.tokens, 64, device=made.device)
    turn = (angles.cos().to(made.dtype), angles.sin().to(made.dtype))
    whole = tuple(torch.cat([each, each], -1) for each in turn)

    def half_turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)

    def turned(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (each.unsqueeze(1) for each in whole)
        return tuple(each * cos + half_turned(each) * sin for each in (q, k))

    return Case(
        "rotary",
        lambda q, k: ROTARY(q, k, *turn, False, False),
        turned,
        (q, k),
        (2 * made.bytes(at.heads + at.key_heads, at.tokens, 128),) * 2,
        liger and (lambda q, k: liger.liger_rope(q, k, *whole)),
    )


def _losses(made: Inputs) -> list[Case]:
    at, liger = made.at, _liger()
    x, targets = made.real(at.tokens, at.width), torch.randint(at.classes, (at.tokens,), device=made.device)
    logits, of_logits = made.real(at.tokens, at.classes), made.bytes(at.tokens, at.classes)
    scales = torch.full((at.tokens,), 1 / at.tokens, device=made.device)
    classes = made.real(at.classes, at.width) / at.width**0.5
    options = (-100, 0.0, 0.0)

    def of_part(x: Tensor) -> tuple[Tensor, ...]:
        wide = x.to(_at_least_float(x))
        above = wide - wide.detach().amax(-1, keepdim=True)
        return above.exp().sum(-1), wide.gather(-1, targets[:, None])[:, 0]

    return [
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
    ]


def _experts(made: Inputs) -> list[Case]:
    """Of 8 experts each token goes to 2; it is routed to 8 of 128."""
    at, device, real = made.at, made.device, made.real
    experts, top_k, row = 8, 2, made.bytes(at.tokens, at.width)
    chosen = torch.rand(at.tokens, experts, device=device).topk(top_k).indices
    order, places, ends = SORT_BY_EXPERT(chosen, experts)
    matrices = real(experts, at.inner, at.width) / at.width**0.5
    scores = made.bytes(at.tokens, 128)
    logits = (torch.rand(at.tokens, 128, device=device).argsort(-1) / 32).to(matrices.dtype)  # no two of a token alike
    flops = 2 * at.tokens * top_k * at.width * at.inner

    def routed(x: Tensor) -> Tensor:  # without a sum of one, whose gradient would be zero here
        return x.softmax(-1, dtype=_at_least_float(x)).topk(8).values

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


def _quantized(made: Inputs) -> Iterator[Case]:
    """Rivals of products are those with weights of `dtype`; of what is quantized, the reference."""
    at, dtype, device = made.at, made.dtype, made.device
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


def _softmax(made: Inputs) -> list[Case]:
    """Scores of eager attention, as many as there are logits."""
    at, real = made.at, made.real
    columns = min(at.tokens, 4096)
    rows = at.tokens * at.classes // (at.key_heads * columns)
    scores, mask = real(1, at.key_heads, rows, columns), real(1, 1, rows, columns)
    moved, of_mask = made.bytes(at.key_heads, rows, columns), made.bytes(rows, columns)
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


def _attention(made: Inputs) -> list[Case]:
    """A quarter of the tokens as a window; four packed sequences; blocks of 64 as BigBird has them."""
    at, device, real = made.at, made.device, made.real
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
