"""Cross-entropy on a GPU; functions have the arguments and results of those in `reference`.

Forward reads the logits once: each lane keeps the largest of its own logits and the sum of exponentials below it
(Milakov and Gimelshein 2018, arXiv:1805.02867), so that lanes meet only at the end of a row. Backward reads each logit
once and writes its gradient, perhaps in its place. A target that is no class gives a loss that is not a number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels.cross_entropy.reference import Options
from graphopt.triton_kernels.launch import launch, power_of_two, rows_of

_LANES = 1024  # columns side by side: 8 in a thread, which are 16 bytes of bfloat16
_STEPS = 4  # so many of them are read at once by a lane, which takes five exponentials for four logits
_WARPS = 4
_BLOCK = 4096  # of backward
_BACKWARD_WARPS = 8


@triton.jit
def _reduced(logits, counted, classes, TOTALS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr):
    # The largest logit, the sum of exponentials of what logits are above it, the sum of logits.
    largest = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((LANES,), dtype=tl.float32)
    totals = tl.zeros((LANES,), dtype=tl.float32)
    for first in range(0, counted, STEPS * LANES):
        columns = first + tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        inside = columns < classes
        x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(x, axis=0))
        base = tl.where(now == float("-inf"), 0.0, now)
        sums = sums * tl.exp(largest - base) + tl.sum(tl.exp(x - base[None, :]), axis=0)
        largest = now
        if TOTALS:
            totals += tl.sum(tl.where(inside, x, 0.0), axis=0)
    top = tl.max(largest, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(sums * tl.exp(largest - base), axis=0), tl.sum(totals, axis=0)


@triton.jit
def _forward(
    LOGITS, TARGETS, LOSS, LSE, stride, classes, ignore_index, label_smoothing, z_loss,
    SMOOTHS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    target = tl.load(TARGETS + row)
    counted = tl.where(target == ignore_index, 0, classes)
    top, powers, total = _reduced(logits, counted, classes, SMOOTHS, STEPS, LANES)
    lse = tl.where(top == float("-inf"), 0.0, top) + tl.log(powers)
    tl.store(LSE + row, tl.where(target == ignore_index, 0.0, lse))
    is_class = (target >= 0) & (target < classes)
    chosen = tl.load(logits + target, mask=is_class, other=float("nan")).to(tl.float32)
    loss = (1.0 - label_smoothing) * (lse - chosen) + z_loss * lse * lse
    if SMOOTHS:
        loss += label_smoothing * (lse - total / classes)
    tl.store(LOSS + row, tl.where(target == ignore_index, 0.0, loss))


@triton.jit
def _backward(
    LOGITS, GRADIENT, TARGETS, LSE, OF_LOGITS, stride, of_stride, classes, ignore_index, label_smoothing, z_loss,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < classes
    target = tl.load(TARGETS + row)
    counted = tl.where(target == ignore_index, 0, classes)
    gradient = tl.load(GRADIENT + row).to(tl.float32)
    gradient = tl.where((target >= 0) & (target < classes), gradient, float("nan"))
    lse = tl.load(LSE + row)
    x = tl.load(LOGITS + row * stride + columns, mask=columns < counted, other=0.0).to(tl.float32)
    of_x = tl.exp(x - lse) * (1.0 + 2.0 * z_loss * lse) - label_smoothing / classes
    of_x = gradient * tl.where(columns == target, of_x - (1.0 - label_smoothing), of_x)
    of_x = tl.where(columns < counted, of_x, 0.0)
    tl.store(OF_LOGITS + row * of_stride + columns, of_x.to(OF_LOGITS.dtype.element_ty), mask=inside)


@triton.jit
def _part_forward(
    LOGITS, TARGETS, LARGEST, POWERS, CHOSEN, TOTAL, stride, classes,
    TOTALS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    top, powers, total = _reduced(logits, classes, classes, TOTALS, STEPS, LANES)
    tl.store(LARGEST + row, top)
    tl.store(POWERS + row, powers)
    target = tl.load(TARGETS + row)
    is_class = (target >= 0) & (target < classes)
    chosen = tl.load(logits + target, mask=is_class, other=float("nan")).to(tl.float32)
    tl.store(CHOSEN + row, tl.where(target == -1, 0.0, chosen))
    if TOTALS:
        tl.store(TOTAL + row, total)


@triton.jit
def _part_backward(
    LOGITS, TARGETS, LARGEST, OF_POWERS, OF_CHOSEN, OF_TOTALS, OF_LOGITS, stride, of_stride, classes,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < classes
    target = tl.load(TARGETS + row)
    largest = tl.load(LARGEST + row)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    x = tl.load(LOGITS + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    of_x = tl.load(OF_POWERS + row) * tl.exp(x - base)
    if OF_TOTALS is not None:
        of_x += tl.load(OF_TOTALS + row)
    of_x = tl.where(columns == target, of_x + tl.load(OF_CHOSEN + row), of_x)
    tl.store(OF_LOGITS + row * of_stride + columns, of_x.to(OF_LOGITS.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    loss, lse = (torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    rows = rows_of(logits)
    count, classes = rows.shape
    launch(_forward, count, rows, targets.contiguous(), loss, lse, rows.stride(0), classes, *options,
           SMOOTHS=options.label_smoothing != 0, **_lanes(classes))  # fmt: skip
    return loss, lse


def cross_entropy_backward(logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, options: Options) -> Tensor:
    of_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _put(rows_of(logits), gradient, targets, lse, of_logits.view(-1, logits.shape[-1]), options)
    return of_logits


def cross_entropy_backward_(logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, options: Options) -> None:
    rows = logits.view(-1, logits.shape[-1])
    _put(rows, gradient, targets, lse, rows, options)


def cross_entropy_part(logits: Tensor, targets: Tensor, has_totals: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    largest, powers, chosen, totals = (
        torch.empty(targets.shape if wanted else 0, dtype=torch.float32, device=logits.device)
        for wanted in (True, True, True, has_totals)
    )
    rows = rows_of(logits)
    count, classes = rows.shape
    launch(_part_forward, count, rows, targets.contiguous(), largest, powers, chosen, totals, rows.stride(0), classes,
           TOTALS=has_totals, **_lanes(classes))  # fmt: skip
    return largest, powers, chosen, totals


def cross_entropy_part_backward(
    logits: Tensor, targets: Tensor, largest: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor | None
) -> Tensor:
    of_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    of_rows = of_logits.view(-1, logits.shape[-1])
    _put_part(rows_of(logits), targets, largest, of_powers, of_chosen, of_totals, of_rows)
    return of_logits


def cross_entropy_part_backward_(
    logits: Tensor, targets: Tensor, largest: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor | None
) -> None:
    rows = logits.view(-1, logits.shape[-1])
    _put_part(rows, targets, largest, of_powers, of_chosen, of_totals, rows)


def _put(rows: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, of_rows: Tensor, options: Options) -> None:
    count, classes = rows.shape
    block = _block(classes)
    launch(_backward, count * triton.cdiv(classes, block["BLOCK"]), rows, gradient.contiguous(), targets.contiguous(),
           lse.contiguous(), of_rows, rows.stride(0), of_rows.stride(0), classes, *options, **block)  # fmt: skip


def _put_part(
    rows: Tensor,
    targets: Tensor,
    largest: Tensor,
    of_powers: Tensor,
    of_chosen: Tensor,
    of_totals: Tensor | None,
    of_rows: Tensor,
) -> None:
    count, classes = rows.shape
    block = _block(classes)
    of_tokens = [None if each is None else each.contiguous() for each in (largest, of_powers, of_chosen, of_totals)]
    launch(_part_backward, count * triton.cdiv(classes, block["BLOCK"]), rows, targets.contiguous(), *of_tokens,
           of_rows, rows.stride(0), of_rows.stride(0), classes, **block)  # fmt: skip


def _lanes(classes: int) -> dict[str, int]:
    lanes = min(_LANES, power_of_two(classes))
    return {
        "warps": max(1, _WARPS * lanes // _LANES),
        "STEPS": _STEPS if classes > lanes else 1,
        "LANES": lanes,
    }


def _block(classes: int) -> dict[str, int]:
    block = min(_BLOCK, power_of_two(classes))
    return {"warps": max(1, _BACKWARD_WARPS * block // _BLOCK), "BLOCK": block}
