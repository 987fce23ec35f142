"""How far kernels may be from the same in float64."""

import torch

DTYPES = [torch.float32, torch.bfloat16]


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-6) -> None:
    """At most `bound` of the largest element of its row, and half a unit of bfloat16 where that is the dtype."""
    assert expected.dtype == torch.float64 and found.shape == expected.shape
    if not expected.numel():
        return
    rows = expected.reshape(-1, expected.shape[-1]) if expected.dim() > 1 else expected[None]
    allowed = bound * rows.abs().amax(-1, keepdim=True).expand_as(rows).reshape(expected.shape)
    if found.dtype == torch.bfloat16:
        allowed = allowed + expected.abs() * 2.0**-8
    apart = (found.double() - expected).abs() - allowed
    assert apart.max() <= 0, f"{apart.max().item()} more than allowed at {int(apart.argmax())}"


def doubled(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


def random(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
