"""No kernel spills, and all fit: of all launches by the table, which is of these sources, of some by compiling them."""

import json

import pytest
import torch

from graphopt.cuda_ext.experts import Weighing
from graphopt.triton_kernels import _triton
from graphopt.triton_kernels.activations import kernel as activations
from graphopt.triton_kernels.attention import kernel as attention
from graphopt.triton_kernels.attention.masks import Mask
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
from graphopt.triton_kernels.resources import REGISTERS, SHARED_MEMORY, TABLE, launches, measured, sources
from graphopt.triton_kernels.rotary import kernel as rotary
from graphopt.triton_kernels.softmax import kernel as softmax

TOLD = json.loads(TABLE.read_text())
SOME = [
    "norms, 128 bfloat16",
    "activations, silu",
    "rotary, interleaved",
    "cross_entropy, bfloat16",
    "weights, 4 bits, 64 rows",
    "scaled, int8, 64 rows",
    "experts, 8 of 128 by softmax",
    "softmax, 4096 bfloat16",
]

_BYTES_AT_ONCE = 16


def _recorded(launch: str, capability: int) -> list[dict[str, object]]:
    return [row for row in TOLD["kernels"] if (row["launch"], row["capability"]) == (launch, capability)]


def _check_fits(kernel) -> None:
    assert kernel["stack"] == 0, f"spills: {kernel}"
    assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]], f"has no room in shared memory: {kernel}"
    assert kernel["load"] >= _BYTES_AT_ONCE, f"reads little at once: {kernel}"
    assert kernel["registers"] * kernel["threads"] <= REGISTERS, f"has no room in registers: {kernel}"


def test_the_table_is_of_these_kernels_and_each_fits() -> None:
    assert TOLD["sources"] == sources(), "run python -m graphopt.triton_kernels.resources"
    assert {(row["launch"], row["capability"]) for row in TOLD["kernels"]} == {
        (launch, capability) for capability in SHARED_MEMORY for launch in launches(capability)
    }
    for row in TOLD["kernels"]:
        _check_fits(row)


def _check(launch: str, capability: int) -> None:
    found = measured(launch, capability)
    for kernel in found:
        _check_fits(kernel)
    if TOLD["triton"] == _triton.version():  # other versions use other registers
        assert found == _recorded(launch, capability)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("launch", SOME)
def test_some_are_as_the_table_says(launch, capability) -> None:
    _check(launch, capability)


@pytest.mark.long
@pytest.mark.parametrize(
    ("launch", "capability"), [(launch, each) for each in SHARED_MEMORY for launch in launches(each)]
)
def test_all_are_as_the_table_says(launch, capability) -> None:
    _check(launch, capability)


def test_what_is_read_at_once_follows_from_how_rows_lie() -> None:
    """Which is known from the launch, as on a GPU."""
    loads = []
    for stride in (4096, 4099):
        x = torch.empty_strided((64, 4096), (stride, 1), dtype=torch.bfloat16, device="meta")
        with _triton.compiling(90) as compiled:
            norms.forward(x, None, None, None, None, Norm(1e-6, False))
        loads += [kernel.load for kernel in compiled]
    assert loads == [16, 2]


def test_sizes_of_one_compile_too() -> None:
    """Which Triton knows as it compiles, where other sizes are variables."""
    x, row, of_row = (torch.empty(shape, device="meta") for shape in ((1, 1), (1,), (1,)))
    q, angle = torch.empty(1, 1, 1, 2, device="meta"), torch.empty(1, 1, 1, device="meta")
    target = torch.empty(1, dtype=torch.int64, device="meta")
    values = torch.empty(1, 1, dtype=torch.int8, device="meta")
    with _triton.compiling(90) as compiled:
        norms.forward(x, x, x.bool(), row, None, Norm(1e-6, False))
        norms.backward(x, x, x.bool(), row, row, of_row, of_row, x, Norm(1e-6, True))
        activations.gated_backward(x, x, x, "silu")
        activations.bias_activation_backward(x, x, row, "gelu")
        rotary.rotary(q, q, angle, angle, True, False)
        weights.quantized_linear(x, values, x, x, row, 8)
        weights.dequantize_weight(values.to(torch.uint8), x, None, 4, torch.float32)
        scaled.quantize_rows(x, torch.int8)
        scaled.quantize_tensor(x, torch.int8)
        scaled.scaled_mm(values, of_row, values, row[0], row, torch.float32)
        blocks.quantize_blocks(row, 4, 16, target[0])
        blocks.dequantize_blocks(values.expand(1, 16), of_row, 8, 1, torch.float32)
        cross_entropy.cross_entropy(x, target, Options(1, 1.0, 1.0))
        cross_entropy.cross_entropy_backward(x, of_row, target, of_row, Options(1, 1.0, 1.0))
        cross_entropy.cross_entropy_part(x, target, True)
        cross_entropy.cross_entropy_part_backward(x, target, of_row, of_row, of_row, None)
        softmax.softmax(x, x, 1.0, True, None)
        softmax.softmax_backward(x, x, 1.0, x.dtype)
        attention.attention(q, q, q, Mask(None, None, True, 1, 1.0))
        attention.attention_backward(q, q, q, q, q, angle, Mask(None, None, True, 1, 1.0))
    assert len(compiled) == 22


@pytest.mark.long
def test_one_expert_of_one_token_compiles_too() -> None:
    x, one = torch.empty(1, 1, device="meta"), torch.empty(1, dtype=torch.int32, device="meta")
    at = torch.empty(1, 1, dtype=torch.int64, device="meta")
    with _triton.compiling(90) as compiled:
        routing.route(x, one.float(), 1, Weighing("sigmoid", True, 0.0, 1.0), 1, 1)
        routing.route_backward(x, x, at, Weighing("softmax", True, 0.0, 1.0))
        permutation.sort_by_expert(at, 1)
        permutation.permute_tokens(x, at)
        permutation.unpermute_tokens(x, None, at)
        permutation.unpermute_tokens_backward(x, x, x, at)
        products.grouped_mm(x, x[None], one)
        products.grouped_outer(x, x, one)
    assert len(compiled) == 10
