"""Products of few rows with weights of 8 or 4 bits, which are read as they are and become floats in a register.

Weights are quantized by groups of neighboring inputs: weight = (value - zero) * scale, with a scale, and where they are
given a zero, of each group of each output.
"""

from dataclasses import dataclass

import torch

from graphopt.cuda_ext import reference
from graphopt.cuda_ext.arguments import ELEMENTS, FLOAT32, check, check_choice
from graphopt.cuda_ext.library import library

_BF16 = torch.bfloat16


@dataclass(frozen=True)
class Quantized:
    """The weights of a linear layer.

    values: int8 [outputs, inputs] where bits are 8. Where they are 4, uint8 [outputs, inputs / 2]: byte j of a group
    holds its element j in the low four bits, and j + group / 2 in the high ones.
    scales, zeros: float32 [outputs, groups]; zeros None is the middle of the range, 0 for 8 bits and 8 for 4.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int

    @property
    def outputs(self) -> int:
        return self.values.shape[0]

    @property
    def inputs(self) -> int:
        return self.values.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.inputs // self.scales.shape[1] if self.scales.shape[1] else 0

    def check(self) -> None:
        """Raises ValueError that names the field which does not fit the others."""
        check_choice("bits", self.bits, (8, 4))
        check("values", self.values, (None, None), (torch.int8 if self.bits == 8 else torch.uint8,))
        check("scales", self.scales, (self.outputs, None), FLOAT32)
        groups, of = self.scales.shape[1], self.inputs
        if of and (not groups or of % groups or (self.bits == 4 and of // groups % 2)):
            even = "even " if self.bits == 4 else ""
            raise ValueError(f"scales has {groups} groups, which do not divide {of} inputs into {even}parts")
        if self.zeros is not None:
            check("zeros", self.zeros, self.scales.shape, FLOAT32)


def quantize(weight: torch.Tensor, bits: int, group: int | None = None, has_zeros: bool = False) -> Quantized:
    """The nearest `Quantized` of float `weight` [outputs, inputs] whose largest element, by group, stays in range.

    group: a divisor of the inputs, even where bits are 4; all of them by default. has_zeros: the range of values is
    from the smallest to the largest weight, else it is as far from 0 on either side. A group of which a weight is not
    finite has the scale nan.
    """
    check_choice("bits", bits, (8, 4))
    check("weight", weight, (None, None), (*ELEMENTS, torch.float64), is_contiguous=False)
    inputs = weight.shape[1]
    size = inputs if group is None else group
    if size < 1 or inputs % size or (bits == 4 and size % 2):
        raise ValueError(f"group is {size}, not {'an even' if bits == 4 else 'a'} divisor of {inputs} inputs")
    values, scales, zeros = reference.quantized(weight, bits, size, has_zeros)
    return Quantized(values, scales, zeros if has_zeros else None, bits)


def linear(x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, inputs] times the transposed weights, plus bias [outputs], in the dtype of x: [rows, outputs].

    Products and sums are float32. Right for any number of rows, and fast for few. Raises ValueError that names what
    does not fit.
    """
    weight.check()
    check("x", x, (None, weight.inputs), ELEMENTS)
    if bias is not None:
        check("bias", bias, (weight.outputs,), (x.dtype, torch.float32))
    native = library("quantized.cpp")
    if native is None or not weight.inputs:
        return reference.quantized_linear(x, weight.values, weight.scales, weight.zeros, weight.bits, bias)
    y = x.new_empty(x.shape[0], weight.outputs)
    tensors = (x, weight.values, weight.scales, weight.zeros, bias, y)
    sizes = (x.shape[0], weight.inputs, weight.outputs, weight.group, weight.bits)
    native.call("quantized_linear", *tensors, *sizes, x.dtype == _BF16, bias is not None and bias.dtype == _BF16)
    return y
