"""A linear layer whose weights have 8 or 4 bits, in place of one that was trained in floating numbers."""

import torch
from torch import Tensor, nn

from graphopt.triton_kernels.quantization.weights.op import QUANTIZE_WEIGHT, QUANTIZED_LINEAR


class QuantizedLinear(nn.Module):
    """As `nn.Linear`, of weights that are constants: buffers `values`, `scales` and `zeros`.

    How they lie: `graphopt.triton_kernels.quantization.weights.reference`. The input and the bias have gradients.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: nn.Parameter | None, bits: int
    ) -> None:
        super().__init__()
        self.bits, self.bias = bits, bias
        for name, tensor in (("values", values), ("scales", scales), ("zeros", zeros)):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = QUANTIZED_LINEAR(x, self.values, self.scales, self.zeros, self.bias, self.bits)
        return y

    def extra_repr(self) -> str:
        outputs, groups = self.scales.shape
        return f"outputs={outputs}, groups={groups}, bits={self.bits}"


def quantize_linear(layer: nn.Linear, bits: int = 8, group: int = 128, has_zeros: bool = False) -> QuantizedLinear:
    """The layer with weights of 8 or 4 bits, the nearest by groups of inputs; its bias is that of `layer`.

    group: a divisor of the inputs, even where bits are 4. has_zeros: a group's range is from its smallest weight to its
    largest, else as far from 0 on either side. Raises ValueError that names what does not fit.
    """
    with torch.no_grad():
        values, scales, zeros = QUANTIZE_WEIGHT(layer.weight, bits, group, has_zeros)
    return QuantizedLinear(values, scales, zeros if has_zeros else None, layer.bias, bits)
