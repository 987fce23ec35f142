"""torch's own product by group, and what it takes: it is as fast as a product of matrices where it has a kernel.

That is bfloat16 on GPUs of capability 9 and 10; on others it loops over groups on the host, which waits for their ends.
On the CPU it loops too, in native code. It leaves rows past the last end as memory was.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGNMENT = 16  # bytes, of what the kernel reads
_CAPABILITIES = (9, 10)  # major ones


def takes(*operands: Tensor) -> bool:
    """Whether torch's kernel takes such operands as they lie in memory."""
    return all(map(_is_aligned, operands))


def is_fast(rows: Tensor) -> bool:
    """Whether there is a kernel of torch for such rows on their GPU."""
    is_half = rows.dtype is torch.bfloat16 and rows.is_cuda
    return is_half and torch.cuda.get_device_capability(rows.device)[0] in _CAPABILITIES


def product(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    result: Tensor = F.grouped_mm(rows, others, offs=ends)
    return result.contiguous()


def _is_aligned(operand: Tensor) -> bool:
    lines = operand if operand.stride(-1) == 1 else operand.mT
    return (
        operand.numel() > 0
        and lines.stride(-1) == 1
        and lines.stride(-2) >= lines.shape[-1]
        and operand.data_ptr() % _ALIGNMENT == 0
        and all(stride * operand.element_size() % _ALIGNMENT == 0 for stride in lines.stride()[:-1])
    )
