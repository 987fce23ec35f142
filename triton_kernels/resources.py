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

from graphopt.triton_kernels import _triton
from graphopt.triton_kernels.activations import kernel as activations
from graphopt.triton_kernels.attention import kernel as attention
from graphopt.triton_kernels.attention.layouts import lists, local
from graphopt.triton_kernels.cross_entropy import kernel as cross_entropy
from graphopt.triton_kernels.norms import kernel as norms
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
    norms.rms_norm(x, weight, 1e-6, 0.0, False)
    norms.add_rms_norm(x, x, weight, 1e-6, 0.0, True)
    norms.rms_norm_backward(x, x, weight, statistics, x, 0.0)
    norms.add_layer_norm(x, x, weight, weight, 1e-5)
    norms.layer_norm_backward(x, x, weight, weight, statistics, statistics, x)


def _activations(activation: str, dtype: torch.dtype) -> None:
    x, bias = _on_meta(_TOKENS, 11008, dtype=dtype), _on_meta(11008, dtype=dtype)
    activations.gated(x, x, activation)
    activations.gated_backward(x, x, x, activation)
    activations.bias_activation(x, bias, activation)
    activations.bias_activation_backward(x, x, bias, activation)


def _rotary(interleaved: bool) -> None:
    q, k, angle = _on_meta(1, 32, _TOKENS, 128), _on_meta(1, 8, _TOKENS, 128), _on_meta(1, _TOKENS, 64)
    rotary.rotary(q, k, angle, angle, interleaved, False)


def _cross_entropy(dtype: torch.dtype) -> None:
    logits, targets = _on_meta(_TOKENS, _CLASSES, dtype=dtype), _on_meta(_TOKENS, dtype=torch.int64)
    cross_entropy.cross_entropy(logits, targets, -100, 0.1, 1e-4)
    cross_entropy.cross_entropy_backward_(logits, _per_token(), targets, _per_token(), -100, 0.1, 1e-4)


def _softmax(width: int, dtype: torch.dtype) -> None:
    x, mask = _on_meta(1, 32, 4096, width, dtype=dtype), _on_meta(1, 1, 4096, width, dtype=dtype)
    softmax.softmax(x, mask, 0.125, False, None)
    softmax.softmax(x, None, 0.125, True, None)
    softmax.softmax_backward(x, x, 0.125, dtype)


def _attention(width: int, dtype: torch.dtype) -> None:
    q, k = (_on_meta(1, _TOKENS, heads, width, dtype=dtype).transpose(1, 2) for heads in (32, 8))
    statistics = _on_meta(1, 32, _TOKENS, dtype=torch.float32)
    mask = (None, None, True, 1024, 0.125)
    attention.attention(q, k, k, *mask)
    attention.attention_backward(q, q, k, k, q, statistics, *mask)


def _sparse_attention(block: int, width: int, causal: bool) -> None:
    q = _on_meta(1, _TOKENS, 16, width).transpose(1, 2)
    statistics = _on_meta(1, 16, _TOKENS, dtype=torch.float32)
    layout = local(_TOKENS // block, 3)
    (rows, blocks), (columns, of_columns) = ([each.to("meta") for each in lists(x)] for x in (layout, layout.mT))
    attention.sparse_attention(q, q, q, rows, blocks, columns, of_columns, block, causal, 0.125)
    attention.sparse_attention_backward(
        q, q, q, q, q, statistics, rows, blocks, columns, of_columns, block, causal, 0.125
    )


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
    "cross_entropy, bfloat16": partial(_cross_entropy, torch.bfloat16),
    "cross_entropy, float32": partial(_cross_entropy, torch.float32),
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


def measured(launch: str, capability: int) -> list[dict[str, Any]]:
    """The kernels that one of `LAUNCHES` runs, in order, as compiled for GPUs of a capability."""
    with _triton.compiling(capability) as compiled:
        LAUNCHES[launch]()
    return [{"capability": capability, "launch": launch, **kernel._asdict()} for kernel in compiled]


def sources() -> str:
    """A hash of the text that the table follows from."""
    folder = TABLE.parent
    files = [folder / "launch.py", folder / "resources.py", *sorted(folder.glob("*/kernel.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _write() -> None:
    kernels = [kernel for capability in SHARED_MEMORY for name in LAUNCHES for kernel in measured(name, capability)]
    rows = ",\n".join(map(json.dumps, kernels))
    head = f'"triton": "{_triton.version()}",\n"sources": "{sources()}"'
    TABLE.write_text(f'{{{head},\n"kernels": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    _write()
