"""What each kernel takes of a GPU: registers, spills and shared memory, as its launcher compiles it, without a GPU.

The table is resources.json, which ``python -m graphopt.triton_kernels.resources`` writes anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.cuda_ext.experts import Weighing
from graphopt.triton_kernels import _triton
from graphopt.triton_kernels.activations import kernel as activations
from graphopt.triton_kernels.attention import kernel as attention
from graphopt.triton_kernels.attention.layouts import lists, local
from graphopt.triton_kernels.attention.masks import Blocks, Mask
from graphopt.triton_kernels.cross_entropy import kernel as cross_entropy
from graphopt.triton_kernels.cross_entropy.reference import Options
from graphopt.triton_kernels.experts.permutation import kernel as permutation
from graphopt.triton_kernels.experts.products import kernel as products
from graphopt.triton_kernels.experts.routing import kernel as routing
from graphopt.triton_kernels.norms import kernel as norms
from graphopt.triton_kernels.norms.reference import Norm
from graphopt.triton_kernels.quantization.blocks import kernel as blocks
from graphopt.triton_kernels.quantization.scaled import kernel as scaled
from graphopt.triton_kernels.quantization.weights import kernel as weights
from graphopt.triton_kernels.rotary import kernel as rotary
from graphopt.triton_kernels.softmax import kernel as softmax

TABLE = Path(__file__).with_name("resources.json")
# Bytes of a program at most: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
REGISTERS = 65536  # of a multiprocessor
_TOKENS = 4096
_CLASSES = 128256


def _on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms(width: int, dtype: torch.dtype) -> None:
    x, weight, statistics = _on_meta(_TOKENS, width, dtype=dtype), _on_meta(width, dtype=dtype), _per_token()
    mask, narrow = _on_meta(_TOKENS, width, dtype=torch.bool), _on_meta(_TOKENS, width)
    rms, layer = Norm(1e-6, False, scale=1.25), Norm(1e-5, True, scale=1.25)
    norms.forward(x, None, None, weight, None, rms)
    norms.forward(x, x, None, weight, None, rms._replace(round_first=True))
    norms.forward(x, x, mask, weight, None, rms._replace(dtype=torch.bfloat16))
    norms.backward(x, x, None, weight, None, None, statistics, x, rms)
    norms.backward(x, narrow, mask, weight, None, None, statistics, x, rms)
    norms.forward(x, x, mask, weight, weight, layer)
    norms.backward(x, x, None, weight, weight, statistics, statistics, x, layer)
    norms.backward(x, x, mask, weight, weight, statistics, statistics, x, layer)


def _activations(activation: str, dtype: torch.dtype) -> None:
    x, bias = _on_meta(_TOKENS, 11008, dtype=dtype), _on_meta(11008, dtype=dtype)
    activations.gated(x, x, activation)
    activations.gated_backward(x, x, x, activation)
    activations.bias_activation(x, bias, activation)
    activations.bias_activation_backward(x, x, bias, activation)


def _rotary(interleaved: bool, apart: bool = False) -> None:
    q, k, angle = _on_meta(1, 32, _TOKENS, 128), _on_meta(1, 8, _TOKENS, 128), _on_meta(1, _TOKENS, 64)
    rotary.rotary(q, k, angle, angle, interleaved, False, apart)


def _cross_entropy(dtype: torch.dtype) -> None:
    logits, targets = _on_meta(_TOKENS, _CLASSES, dtype=dtype), _on_meta(_TOKENS, dtype=torch.int64)
    options, of_token = Options(-100, 0.1, 1e-4), _per_token()
    cross_entropy.cross_entropy(logits, targets, options)
    cross_entropy.cross_entropy_backward_(logits, of_token, targets, of_token, options)
    cross_entropy.cross_entropy_part(logits, targets, True)
    cross_entropy.cross_entropy_part_backward_(logits, targets, of_token, of_token, of_token, of_token)


def _weights(bits: int, has_zeros: bool, tokens: int) -> None:
    outputs, inputs, group = 4096, 4096, 128
    values = _on_meta(outputs, inputs * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = _on_meta(outputs, inputs // group, dtype=torch.float32)
    zeros = scales if has_zeros else None
    weights.quantized_linear(_on_meta(tokens, inputs), values, scales, zeros, _on_meta(outputs), bits)
    weights.dequantize_weight(values, scales, zeros, bits, torch.bfloat16)


def _scaled(dtype: torch.dtype, tokens: int) -> None:
    values, weight = (_on_meta(n, 4096, dtype=dtype) for n in (tokens, 4096))
    of_tokens, of_outputs = (_on_meta(n, dtype=torch.float32) for n in (tokens, 4096))
    scaled.scaled_mm(values, of_tokens, weight, of_outputs, _on_meta(4096), torch.bfloat16)


def _to_scaled(dtype: torch.dtype) -> None:
    for width in (128, 1024, 4096, 16384, 32768):
        scaled.quantize_rows(_on_meta(_TOKENS, width), dtype)
    scaled.quantize_tensor(_on_meta(_TOKENS, 4096), dtype)


def _blocks(bits: int, is_random: bool) -> None:
    seed = _on_meta(dtype=torch.int64) if is_random else None
    for block in (256, 2048):
        blocks.quantize_blocks(_on_meta(1 << 20), bits, block, seed)
        values = _on_meta(8, 1 << 12, block * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        scales = _on_meta(8, 1 << 12, dtype=torch.float32)
        blocks.dequantize_blocks(values, scales, bits, block << 12, torch.bfloat16)


def _routing(scores: str, experts: int, top_k: int, groups: int, top_groups: int) -> None:
    logits = _on_meta(_TOKENS, experts)
    bias = _on_meta(experts, dtype=torch.float32) if scores == "sigmoid" else None
    weighing = Weighing(scores, True, 1e-20, 2.5)
    weights, chosen = routing.route(logits, bias, top_k, weighing, groups, top_groups)
    routing.route_backward(logits, weights, chosen, weighing)


def _permutation(dtype: torch.dtype) -> None:
    x, chosen = _on_meta(_TOKENS, 4096, dtype=dtype), _on_meta(_TOKENS, 8, dtype=torch.int64)
    _, places, _ = permutation.sort_by_expert(chosen, 128)
    rows, weights = permutation.permute_tokens(x, places), _on_meta(_TOKENS, 8, dtype=torch.float32)
    permutation.unpermute_tokens(rows, weights, places)
    permutation.unpermute_tokens_backward(x, rows, weights, places)


def _products(tokens: int, dtype: torch.dtype) -> None:
    rows, others = _on_meta(tokens, 4096, dtype=dtype), _on_meta(tokens, 1536, dtype=dtype)
    matrices, ends = _on_meta(128, 1536, 4096, dtype=dtype), _on_meta(128, dtype=torch.int32)
    products.grouped_mm(rows, matrices.mT, ends)
    products.grouped_mm(others, matrices, ends)
    products.grouped_outer(rows, others, ends)


def _products_in_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        _products(65536, torch.float32)
    finally:
        matmul.fp32_precision = before


def _softmax(width: int, dtype: torch.dtype) -> None:
    x, mask = _on_meta(1, 32, 4096, width, dtype=dtype), _on_meta(1, 1, 4096, width, dtype=dtype)
    softmax.softmax(x, mask, 0.125, False, None)
    softmax.softmax(x, None, 0.125, True, None)
    softmax.softmax_backward(x, x, 0.125, dtype)


def _attention(width: int, dtype: torch.dtype) -> None:
    q, k = (_on_meta(1, _TOKENS, heads, width, dtype=dtype).transpose(1, 2) for heads in (32, 8))
    statistics = _on_meta(1, 32, _TOKENS, dtype=torch.float32)
    mask = Mask(None, None, True, 1024, 0.125)
    attention.attention(q, k, k, mask)
    attention.attention_backward(q, q, k, k, q, statistics, mask)


def _sparse_attention(block: int, width: int, causal: bool) -> None:
    q = _on_meta(1, _TOKENS, 16, width).transpose(1, 2)
    statistics = _on_meta(1, 16, _TOKENS, dtype=torch.float32)
    layout = local(_TOKENS // block, 3)
    (rows, blocks), (columns, of_columns) = ([each.to("meta") for each in lists(x)] for x in (layout, layout.mT))
    listed = Blocks(rows, blocks, columns, of_columns, block, causal, 0.125)
    attention.sparse_attention(q, q, q, listed)
    attention.sparse_attention_backward(q, q, q, q, q, statistics, listed)


def _per_token() -> Tensor:
    return _on_meta(_TOKENS, dtype=torch.float32)


LAUNCHES: Mapping[str, Callable[[], None]] = {
    **{f"norms, {width} bfloat16": partial(_norms, width, torch.bfloat16) for width in (128, 1024, 4096, 8192, 16384)},
    **{f"norms, {width} float32": partial(_norms, width, torch.float32) for width in (1024, 8192, 32768)},
    **{
        f"activations, {activation}": partial(_activations, activation, torch.bfloat16)
        for activation in ("silu", "gelu", "gelu_tanh")
    },
    "rotary, halves": partial(_rotary, False),
    "rotary, interleaved": partial(_rotary, True),
    "rotary, interleaved then apart": partial(_rotary, True, True),
    "cross_entropy, bfloat16": partial(_cross_entropy, torch.bfloat16),
    "cross_entropy, float32": partial(_cross_entropy, torch.float32),
    **{
        f"weights, {bits} bits{', zeros' * has_zeros}, {tokens} rows": partial(_weights, bits, has_zeros, tokens)
        for bits in (8, 4)
        for has_zeros in (False, True)
        for tokens in (1, 64, 512)
    },
    **{f"scaled, int8, {tokens} rows": partial(_scaled, torch.int8, tokens) for tokens in (1, 64, 4096)},
    "to int8": partial(_to_scaled, torch.int8),
    **{
        f"blocks, {bits} bits{', random' * is_random}": partial(_blocks, bits, is_random)
        for bits in (8, 4)
        for is_random in (False, True)
    },
    "experts, 8 of 128 by softmax": partial(_routing, "softmax", 128, 8, 1, 1),
    "experts, 8 of 256 by sigmoid in groups": partial(_routing, "sigmoid", 256, 8, 8, 4),
    "experts, rows of bfloat16": partial(_permutation, torch.bfloat16),
    "experts, rows of float32": partial(_permutation, torch.float32),
    **{f"experts, {mean} rows each": partial(_products, 128 * mean, torch.bfloat16) for mean in (16, 64, 512)},
    "experts, float32": partial(_products, 65536, torch.float32),
    "experts, float32 as tf32": _products_in_tf32,
    **{f"softmax, {width} bfloat16": partial(_softmax, width, torch.bfloat16) for width in (128, 4096, 32768, 131072)},
    **{f"softmax, {width} float32": partial(_softmax, width, torch.float32) for width in (4096, 32768, 131072)},
    **{
        f"attention, {width} bfloat16": partial(_attention, width, torch.bfloat16)
        for width in (16, 32, 64, 80, 128, 256)
    },
    **{f"attention, {width} float32": partial(_attention, width, torch.float32) for width in (16, 64, 128)},
    **{
        f"attention, blocks of {block} x {width}{', causal' if causal else ''}": partial(
            _sparse_attention, block, width, causal
        )
        for block, width in ((16, 64), (64, 64), (64, 128), (128, 64), (128, 128))
        for causal in (False, True)
    },
}
# What only GPUs have whose tensor cores take float8.
FLOAT8_LAUNCHES: Mapping[str, Callable[[], None]] = {
    f"{name}, {format.removeprefix('float8_')}": partial(run, getattr(torch, format))
    for format in ("float8_e4m3fn", "float8_e5m2")
    for name, run in (
        ("to float8", _to_scaled),
        ("scaled, few rows", partial(_scaled, tokens=1)),
        ("scaled, 64 rows", partial(_scaled, tokens=64)),
        ("scaled, many rows", partial(_scaled, tokens=_TOKENS)),
    )
}
_FLOAT8_CAPABILITY = 89


def launches(capability: int) -> Mapping[str, Callable[[], None]]:
    """What GPUs of a capability run."""
    return {**LAUNCHES, **(FLOAT8_LAUNCHES if capability >= _FLOAT8_CAPABILITY else {})}


def measured(launch: str, capability: int) -> list[dict[str, Any]]:
    """The kernels that one of `launches` runs, in order, as compiled for GPUs of a capability."""
    with _triton.compiling(capability) as compiled:
        launches(capability)[launch]()
    return [{"capability": capability, "launch": launch, **kernel._asdict()} for kernel in compiled]


def sources() -> str:
    """A hash of the text that the table follows from."""
    folder = TABLE.parent
    files = [folder / "launch.py", folder / "resources.py", *sorted(folder.rglob("kernel.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _write() -> None:
    kernels = [
        row for capability in SHARED_MEMORY for name in launches(capability) for row in measured(name, capability)
    ]
    rows = ",\n".join(map(json.dumps, kernels))
    head = f'"triton": "{_triton.version()}",\n"sources": "{sources()}"'
    TABLE.write_text(f'{{{head},\n"kernels": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    _write()
