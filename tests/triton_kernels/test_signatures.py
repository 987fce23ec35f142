"""The operators of kernels on parts of their operands, as their signatures say; and the work that they do."""

import pytest
import torch

from graphopt._torch import is_mutating
from graphopt.cost.operations import work_of
from graphopt.dimensions.signature import operands_of
from graphopt.dimensions.table import signature_of
from graphopt.ir.effects import Effect, effect_of
from graphopt.triton_kernels.activations.op import BIAS_ACTIVATION, GATED
from graphopt.triton_kernels.attention.layouts import bigbird, lists, local
from graphopt.triton_kernels.attention.op import (
    ATTENTION,
    ATTENTION_BACKWARD,
    SPARSE_ATTENTION,
    SPARSE_ATTENTION_BACKWARD,
)
from graphopt.triton_kernels.cross_entropy.linear import LINEAR_CROSS_ENTROPY
from graphopt.triton_kernels.cross_entropy.op import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD_
from graphopt.triton_kernels.experts.permutation.op import PERMUTE_TOKENS, SORT_BY_EXPERT, UNPERMUTE_TOKENS
from graphopt.triton_kernels.experts.routing.op import ROUTE
from graphopt.triton_kernels.norms.op import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from graphopt.triton_kernels.quantization.blocks.op import DEQUANTIZE_BLOCKS, QUANTIZE_BLOCKS
from graphopt.triton_kernels.quantization.scaled.op import DYNAMIC_LINEAR, QUANTIZE_ROWS, QUANTIZE_TENSOR, SCALED_MM
from graphopt.triton_kernels.quantization.weights.op import DEQUANTIZE_WEIGHT, QUANTIZE_WEIGHT, QUANTIZED_LINEAR
from graphopt.triton_kernels.rotary.op import ROTARY
from graphopt.triton_kernels.softmax.op import SOFTMAX
from tests.support.parts import check_linear, check_parts, node_of

B, S, H, G, C = 4, 6, 6, 3, 8


def _real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _targets(*shape: int) -> torch.Tensor:
    return torch.randint(0, C, shape)


def _held(bits: int) -> tuple[torch.Tensor, ...]:
    return QUANTIZE_WEIGHT(_real(C, 4 * S), bits, 4, True)  # type: ignore[no-any-return]


def _scaled(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return QUANTIZE_ROWS(_real(*shape), torch.int8)  # type: ignore[no-any-return]


def _one_scale(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return QUANTIZE_TENSOR(_real(*shape), torch.int8)  # type: ignore[no-any-return]


def _places(tokens: int, top_k: int) -> torch.Tensor:
    return torch.randperm(tokens * top_k).view(tokens, top_k)


def _blocks(layout: torch.Tensor) -> tuple[object, ...]:
    return (*lists(layout), *lists(layout.mT), 16, True, 0.3)


CALLS = {
    "rms_norm": lambda: (RMS_NORM, _real(B, S, C), _real(C), 1e-6, 1.0, False),
    "rms_norm without weight": lambda: (RMS_NORM, _real(B, S, C), None, 1e-6, 0.0, False),
    "add_rms_norm": lambda: (ADD_RMS_NORM, _real(B, S, C), _real(B, S, C), _real(C), 1e-6, 0.0, False),
    "layer_norm": lambda: (LAYER_NORM, _real(B, S, C), _real(C), _real(C), 1e-6),
    "layer_norm with bias alone": lambda: (LAYER_NORM, _real(B, C), None, _real(C), 1e-6),
    "add_layer_norm": lambda: (ADD_LAYER_NORM, _real(B, S, C), _real(B, S, C), None, None, 1e-6),
    "gated": lambda: (GATED, _real(B, S, C), _real(B, S, C), "silu"),
    "bias_activation": lambda: (BIAS_ACTIVATION, _real(B, S, C), _real(C), "gelu"),
    "bias_activation without bias": lambda: (BIAS_ACTIVATION, _real(B, C), None, "gelu_tanh"),
    "rotary": lambda: (ROTARY, _real(B, H, S, 10), _real(B, G, S, 10), _real(1, S, 4), _real(1, S, 4), False, False),
    "rotary of a batch": lambda: (ROTARY, _real(B, H, S, C), _real(B, H, S, C), *_real(2, B, S, 4), True, False),
    "cross_entropy": lambda: (CROSS_ENTROPY, _real(B, S, C), _targets(B, S), -100, 0.1, 1e-3),
    "quantize_weight": lambda: (QUANTIZE_WEIGHT, _real(C, 4 * S), 4, 4, True),
    "dequantize_weight": lambda: (DEQUANTIZE_WEIGHT, *_held(4), 4, torch.float64),
    "dequantize_weight without zeros": lambda: (DEQUANTIZE_WEIGHT, *_held(8)[:2], None, 8, torch.float64),
    "quantized_linear": lambda: (QUANTIZED_LINEAR, _real(B, 3, 4 * S), *_held(4), _real(C), 4),
    "quantized_linear of a row": lambda: (QUANTIZED_LINEAR, _real(4 * S), *_held(8)[:2], None, None, 8),
    "quantize_rows": lambda: (QUANTIZE_ROWS, _real(B, S, C), torch.int8),
    "quantize_tensor": lambda: (QUANTIZE_TENSOR, _real(B, C), torch.int8),
    "scaled_mm": lambda: (SCALED_MM, *_scaled(B, 3, S), *_scaled(C, S), torch.randn(C), torch.float32),
    "scaled_mm of tensors": lambda: (SCALED_MM, *_one_scale(B, S), *_one_scale(C, S), None, torch.float32),
    "dynamic_linear": lambda: (DYNAMIC_LINEAR, _real(B, 3, S), *_scaled(C, S), _real(C)),
    "quantize_blocks": lambda: (QUANTIZE_BLOCKS, _real(B, C), 4, 16, None),
    "dequantize_blocks": lambda: (
        DEQUANTIZE_BLOCKS,
        *QUANTIZE_BLOCKS(_real(B, C), 8, 16, None),
        8,
        B * C,
        torch.float32,
    ),
    "route": lambda: (ROUTE, _real(S, C), None, 3, "softmax", True, 0.0, 1.0, 1, 1),
    "route with biases": lambda: (ROUTE, _real(S, C), torch.rand(C), 3, "sigmoid", True, 1e-20, 2.5, 2, 1),
    "sort_by_expert": lambda: (SORT_BY_EXPERT, _targets(B, S), C),
    "permute_tokens": lambda: (PERMUTE_TOKENS, _real(B, C), _places(B, 2)),
    "unpermute_tokens": lambda: (UNPERMUTE_TOKENS, _real(B * 2, C), _real(B, 2), _places(B, 2)),
    "unpermute_tokens without weights": lambda: (UNPERMUTE_TOKENS, _real(B * 2, C), None, _places(B, 2)),
    "softmax": lambda: (SOFTMAX, _real(B, H, S, C), _real(B, 1, S, C), 0.5, False, None),
    "softmax, causal": lambda: (SOFTMAX, _real(B, S, C), _real(1, C), 0.5, True, None),
    "attention": lambda: (ATTENTION, _real(B, H, S, 7), *[_real(B, G, C, 7)] * 2, None, None, True, 3, 0.5),
    "attention, packed": lambda: (
        ATTENTION, *[_real(1, H, S, 7)] * 3, *[torch.tensor([0, 2, S])] * 2, False, None, 0.5,
    ),
    "sparse_attention": lambda: (SPARSE_ATTENTION, *[_real(B, H, 40, 7)] * 3, *_blocks(local(3, 1))),
    "sparse_attention by heads": lambda: (
        SPARSE_ATTENTION, *[_real(B, H, 40, 7)] * 3, *_blocks(bigbird(3, 1, heads=H)),
    ),
}  # fmt: skip
SPLIT = {
    "rms_norm": [B, S],
    "gated": [B, S, C],
    "bias_activation": [B, S, C],
    "rotary": [B, G, S],
    "rotary of a batch": [B, H, S],
    "cross_entropy": [B, S],
    "quantize_weight": [C, S],
    "dequantize_weight": [C, S],
    "quantized_linear": [B, 3, S, C],
    "quantized_linear of a row": [S, C],
    "quantize_rows": [B, S],
    "scaled_mm": [B, 3, S, C],
    "scaled_mm of tensors": [B, S, C],
    "dynamic_linear": [B, 3, C],
    "quantize_blocks": [],
    "route": [S],
    "sort_by_expert": [],
    "permute_tokens": [C],
    "unpermute_tokens": [C],
    "softmax": [B, H, S],
    "softmax, causal": [B],
    "attention": [B, G],
    "attention, packed": [H],
    "sparse_attention": [B, H],
    "sparse_attention by heads": [B],
}


@pytest.mark.parametrize("name", CALLS)
def test_parts_joined_are_the_whole(name) -> None:
    target, *arguments = CALLS[name]()
    node = node_of(target, *arguments)
    tensors = [operand.meta["val"] for operand in operands_of(node)]
    check_linear(node, tensors)
    for parts in (2, 3):
        check_parts(node, tensors, parts)
    assert effect_of(node) is Effect.PURE


@pytest.mark.parametrize(("name", "sizes"), SPLIT.items())
def test_what_may_be_split(name, sizes) -> None:
    signature = signature_of(node_of(*CALLS[name]()))
    assert signature is not None and [signature.sizes[label] for label in signature.labels] == sizes


def test_each_operand_is_read_once_and_each_result_written_once() -> None:
    work = work_of(node_of(RMS_NORM, torch.randn(10, 32), torch.randn(32), 1e-6, 0.0, False))
    assert (work.read_bytes, work.written_bytes) == (4 * (320 + 32), 4 * (320 + 10))


@pytest.mark.parametrize("asked", [(False, False), (True, False), (True, True)])
def test_a_linear_layer_with_cross_entropy_does_its_products(asked) -> None:
    call = (LINEAR_CROSS_ENTROPY, _real(S, 3), _real(C, 3), _targets(S), _real(S), -100, 0.0, 0.0, *asked)
    node = node_of(*call)
    assert work_of(node).flops == 2 * S * 3 * C * (1 + sum(asked))
    signature = signature_of(node)
    assert signature is not None and not signature.labels


@pytest.mark.parametrize(
    ("call", "dtype"),
    [("quantized_linear", torch.float64), ("scaled_mm", torch.int8), ("dynamic_linear", torch.float64)],
)
def test_products_of_few_bits_do_their_products(call, dtype) -> None:
    """In the dtype of what is multiplied; weights are read as they are held."""
    node = node_of(*CALLS[call]())
    work = work_of(node)
    result = node.meta["val"]
    inputs = operands_of(node)[0].meta["val"].shape[-1]
    assert (work.flops, work.dtype) == (2 * result.numel() * inputs, dtype)
    assert work.read_bytes == sum(operand.meta["val"].nbytes for operand in operands_of(node))


def test_what_writes_its_argument_says_so() -> None:
    assert is_mutating(CROSS_ENTROPY_BACKWARD_)


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [
        ((None, None, True, None), B * H * (6 + 7 + 8)),  # the last query reads all eight keys
        ((None, None, True, 2), B * H * 3 * 2),
        ((None, None, False, None), B * H * 3 * 8),
    ],
)
def test_attention_does_what_its_mask_leaves(mask, pairs) -> None:
    q, k = _real(B, H, 3, 7), _real(B, G, C, 7)
    call = (q, k, k, *mask, 0.5)
    assert work_of(node_of(ATTENTION, *call)).flops == 2 * pairs * (7 + 7)
    out, lse = ATTENTION(*call)
    assert work_of(node_of(ATTENTION_BACKWARD, out, q, k, k, out, lse, *call[3:])).flops == 2 * pairs * 5 * 7


def test_packed_sequences_count_as_if_all_were_as_long() -> None:
    starts = torch.tensor([0, 1, S])
    node = node_of(ATTENTION, *[_real(1, H, S, 7)] * 3, starts, starts, True, None, 0.5)
    assert work_of(node).flops == 2 * H * 2 * (1 + 2 + 3) * (7 + 7)


@pytest.mark.parametrize(("layout", "blocks"), [(local(3, 1), H * 3), (bigbird(3, 1, heads=H, random=0), H * 7)])
def test_sparse_attention_does_its_blocks(layout, blocks) -> None:
    q, rest = _real(B, H, 48, 7), _blocks(layout)
    work = work_of(node_of(SPARSE_ATTENTION, q, q, q, *rest))
    assert work.flops == 2 * B * blocks * 16 * 16 * (7 + 7)
    out, lse = SPARSE_ATTENTION(q, q, q, *rest)
    assert work_of(node_of(SPARSE_ATTENTION_BACKWARD, out, q, q, q, out, lse, *rest)).flops == 5 * work.flops // 2
