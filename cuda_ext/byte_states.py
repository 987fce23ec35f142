"""States of optimizers in one byte an element: what the codes of byte_codes.h stand for, in torch's operators."""

import functools
from typing import NamedTuple, Self

import torch

BLOCK = 256
"""Elements that share a scale."""
_MOST_ZEROS = 6


class ByteState(NamedTuple):
    """codes: uint8, of the parameter's shape; scales: float32, one for each `BLOCK` elements, the last may be fewer.

    An element is its scale times what its code stands for: first states have signs, second ones none.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def zeros(cls, parameter: torch.Tensor) -> Self:
        """For a parameter of this shape and device, contiguous."""
        codes = torch.zeros(parameter.shape, dtype=torch.uint8, device=parameter.device)
        return cls(codes, torch.zeros(scale_count(parameter), device=parameter.device))

    @classmethod
    def of(cls, values: torch.Tensor, *, is_signed: bool) -> Self:
        """The nearest; without signs, nothing but 0 becomes 0."""
        flat = values.reshape(-1).float()
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        scales = scales.where(~(scales < torch.finfo(torch.float32).tiny), 0)
        within = torch.where(scales[:, None] == 0, 0, blocks / scales[:, None])
        numbers, codes = (each.to(values.device) for each in _sorted(is_signed))
        least = int(not is_signed)  # the place of what is next to 0
        nearest = torch.bucketize(within, (numbers[1:] + numbers[:-1]) / 2)
        nearest = nearest.clamp(min=least).where(within != 0, int(is_signed) * 127)
        return cls(codes[nearest].view(-1)[: flat.numel()].view(values.shape), scales)

    def values(self, *, is_signed: bool) -> torch.Tensor:
        """In float32."""
        scales = self.scales.repeat_interleave(BLOCK)[: self.codes.numel()].view(self.codes.shape)
        return numbers(is_signed).to(scales.device)[self.codes.long()] * scales


def scale_count(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // BLOCK)


@functools.cache
def numbers(is_signed: bool) -> torch.Tensor:
    """What each of the 256 codes stands for, float32: dynamic quantization, arXiv:2110.02861, section 2."""
    longest = 6 if is_signed else 7
    found = torch.zeros(256, dtype=torch.float64)
    for zeros in range(_MOST_ZEROS + 1):
        count = 2 ** (longest - zeros)
        fractions = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        found[count : 2 * count] = 10.0**-zeros * (0.1 + 0.9 * fractions)
    if is_signed:
        found[128:] = -found[:128]
        found[128] = 1
    else:
        found[1] = 1
    return found.float()


@functools.cache
def _sorted(is_signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers in order, and their codes."""
    ordered, codes = numbers(is_signed).sort()
    return ordered, codes.to(torch.uint8)
