"""Kernels for the CPU are built for the processor's instruction set, and stood in for where they cannot be."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.cuda_ext import activations, cross_entropy, instructions, norms, quantized, reference, rotary
from graphopt.cuda_ext.library import library
from graphopt.cuda_ext.native import load
from tests.cuda_ext.nearness import random

X, DY = random(torch.float32, 2, 5, 24)
WEIGHT, ROWS = random(torch.float32, 24), random(torch.float32, 5).abs()
TARGETS = torch.tensor([0, 3, -100, 23, 7])
Q, K, TABLES = random(torch.float32, 1, 2, 5, 8), random(torch.float32, 1, 1, 5, 8), random(torch.float32, 2, 1, 5, 4)
HELD = quantized.quantize(random(torch.float32, 6, 24), 4, 8, has_zeros=True)

CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "rms_norm": (norms, (X, WEIGHT, 1e-5, DY, 1.0)),
    "rms_norm_backward": (norms, (DY, X, WEIGHT, ROWS, DY, 1.0)),
    "layer_norm": (norms, (X, WEIGHT, WEIGHT, 1e-5, DY)),
    "layer_norm_backward": (norms, (DY, X, WEIGHT, ROWS, ROWS, DY)),
    "gated": (activations, (X, DY, "gelu")),
    "gated_backward": (activations, (DY, X, DY, "silu")),
    "bias_activation": (activations, (X, WEIGHT, "gelu_tanh")),
    "bias_activation_backward": (activations, (DY, X, WEIGHT, "gelu")),
    "rotary": (rotary, (Q, K, *TABLES)),
    "cross_entropy": (cross_entropy, (X, TARGETS)),
    "cross_entropy_backward": (cross_entropy, (ROWS, X, TARGETS, ROWS)),
    "cross_entropy_with_gradient": (cross_entropy, (X, TARGETS, ROWS)),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_a_compiler_torch_computes_the_same_and_one_line_says_so(
    name: str, without_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    module, arguments = CALLS[name]
    expected = getattr(reference, name)(*arguments)
    with caplog.at_level(logging.WARNING, "graphopt"):
        for _ in range(2):
            torch.testing.assert_close(getattr(module, name)(*arguments), expected, rtol=0, atol=0)
    (message,) = caplog.messages
    assert "\n" not in message and "torch's operators are" in message and "no compiler 'no-such-compiler'" in message


def test_without_a_compiler_gradients_are_written_in_place_too(without_compiler: None) -> None:
    logits = X.clone()
    expected = cross_entropy.cross_entropy_with_gradient(X, TARGETS)[2]
    assert cross_entropy.cross_entropy_with_gradient(logits, TARGETS, in_place=True)[2] is logits
    assert torch.equal(logits, expected)


def test_without_a_compiler_few_bits_are_multiplied_by_torch(without_compiler: None) -> None:
    expected = X @ reference.dequantized(HELD.values, HELD.scales, HELD.zeros, 4).T
    torch.testing.assert_close(quantized.linear(X, HELD), expected)


def test_kernels_and_stand_ins_agree() -> None:
    for name, (module, arguments) in CALLS.items():
        torch.testing.assert_close(getattr(module, name)(*arguments), getattr(reference, name)(*arguments))


def test_the_widest_set_is_what_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, sets in (("AVX2", ("baseline", "avx2")), ("DEFAULT", ("baseline",)), ("SVE256", ("baseline",))):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=found: found)
        assert instructions.available() == sets
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert instructions.available() == tuple(instructions.FLAGS)


def test_each_set_has_a_library_of_its_own() -> None:
    built = {library("rotary.cpp", name) for name in instructions.available()}
    assert len(built) == len(instructions.available()) and None not in built


def test_a_header_that_changes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    header, source = tmp_path / "number.h", tmp_path / "answer.cpp"
    source.write_text('#include "number.h"\nextern "C" int answer() { return number; }\n')
    for number in (42, 43):
        header.write_text(f"constexpr int number = {number};\n")
        assert load(source).answer() == number
