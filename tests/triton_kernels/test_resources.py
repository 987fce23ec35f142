"""No kernel spills, and all fit: of all launches by the table, which is of these sources, of some by compiling them."""

import json

import pytest
import torch

from graphopt.triton_kernels import _triton
from graphopt.triton_kernels.activations import kernel as activations
from graphopt.triton_kernels.attention import kernel as attention
from graphopt.triton_kernels.cross_entropy import kernel as cross_entropy
from graphopt.triton_kernels.norms import kernel as norms
from graphopt.triton_kernels.resources import LAUNCHES, REGISTERS, SHARED_MEMORY, TABLE, measured, sources
from graphopt.triton_kernels.rotary import kernel as rotary
from graphopt.triton_kernels.softmax import kernel as softmax

TOLD = json.loads(TABLE.read_text())
SOME = [
    "norms, 128 bfloat16",
    "activations, silu",
    "rotary, interleaved",
    "cross_entropy, bfloat16",
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
        (launch, capability) for launch in LAUNCHES for capability in SHARED_MEMORY
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
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_all_are_as_the_table_says(launch, capability) -> None:
    _check(launch, capability)


def test_what_is_read_at_once_follows_from_how_rows_lie() -> None:
    """Which is known from the launch, as on a GPU."""
    loads = []
    for stride in (4096, 4099):
        x = torch.empty_strided((64, 4096), (stride, 1), dtype=torch.bfloat16, device="meta")
        with _triton.compiling(90) as compiled:
            norms.rms_norm(x, None, 1e-6, 0.0, False)
        loads += [kernel.load for kernel in compiled]
    assert loads == [16, 2]


def test_sizes_of_one_compile_too() -> None:
    """Which Triton knows as it compiles, where other sizes are variables."""
    x, row, of_row = (torch.empty(shape, device="meta") for shape in ((1, 1), (1,), (1,)))
    q, angle = torch.empty(1, 1, 1, 2, device="meta"), torch.empty(1, 1, 1, device="meta")
    target = torch.empty(1, dtype=torch.int64, device="meta")
    with _triton.compiling(90) as compiled:
        norms.add_rms_norm(x, x, row, 1e-6, 0.0, False)
        norms.layer_norm_backward(x, x, row, row, of_row, of_row, x)
        activations.gated_backward(x, x, x, "silu")
        activations.bias_activation_backward(x, x, row, "gelu")
        rotary.rotary(q, q, angle, angle, True, False)
        cross_entropy.cross_entropy(x, target, 1, 1.0, 1.0)
        cross_entropy.cross_entropy_backward(x, of_row, target, of_row, 1, 1.0, 1.0)
        softmax.softmax(x, x, 1.0, True, None)
        softmax.softmax_backward(x, x, 1.0, x.dtype)
        attention.attention(q, q, q, None, None, True, 1, 1.0)
        attention.attention_backward(q, q, q, q, q, angle, None, None, True, 1, 1.0)
    assert len(compiled) == 12
