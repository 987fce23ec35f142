"""The update of AdamW in native code: against torch's kernels bit by bit, against float64, at every size and place."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt._torch import new_fake_mode, version_of
from graphopt.cuda_ext import adamw
from graphopt.cuda_ext.adamw import Run, Settings, update, update_flat

LEVELS = (0, 1, 2)
SETTINGS = st.builds(
    Settings,
    step=st.integers(1, 10_000),
    lr=st.floats(0, 0.1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0.5, 0.9999)),
    eps=st.floats(1e-12, 1e-4),
    weight_decay=st.floats(0, 0.5),
    gradient_scale=st.sampled_from([1.0, 0.125, 0.3]),
)
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([1023, 16_384, 16_385, 40_001]))


@pytest.fixture(scope="module")
def library() -> Any:
    found = adamw._library()
    assert found is not None, "the tests need a C++ compiler"
    return found


def _run(size: int, *, bf16: bool = False, copy: bool = False, offset: int = 0, seed: int = 0) -> Run:
    """Random values, each tensor `offset` elements into one of its own."""
    generator = torch.Generator().manual_seed(seed)
    parameter, gradient, exp_avg, exp_avg_sq = torch.randn(4, offset + size, generator=generator)
    gradient = gradient.bfloat16() if bf16 else gradient
    rounded = torch.zeros(offset + size, dtype=torch.bfloat16)[offset:] if copy else None
    squares = exp_avg_sq.square().clone()
    return Run(
        parameter.clone()[offset:], gradient.clone()[offset:], exp_avg.clone()[offset:], squares[offset:], rounded
    )


def _cloned(run: Run) -> Run:
    return Run(*(tensor if tensor is None else tensor.clone() for tensor in run))


def _equal(ours: Run, theirs: Run) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _units(found: torch.Tensor, expected: torch.Tensor, *operands: torch.Tensor) -> float:
    """The largest difference, in units in the last place of float32 of the largest operand.

    Not of the result: where the update nearly cancels the parameter, that has none of the places that were rounded.
    """
    scale = torch.stack([expected, *operands]).abs().amax(0).float().numpy()
    apart = (found.double() - expected.double()).abs().numpy()
    return float((apart / np.spacing(scale).astype(np.float64)).max(initial=0))


def _by_torch(run: Run, at: Settings, **options: Any) -> Run:
    parameter = torch.nn.Parameter(run.parameter.clone())
    parameter.grad = run.gradient.float() * at.gradient_scale
    optimizer = torch.optim.AdamW([parameter], at.lr, at.betas, at.eps, at.weight_decay, **options)
    state = {"step": torch.tensor(at.step - 1.0), "exp_avg": run.exp_avg.clone(), "exp_avg_sq": run.exp_avg_sq.clone()}
    optimizer.state[parameter] = state
    optimizer.step()
    rounded = None if run.copy is None else parameter.detach().bfloat16()
    return Run(parameter.detach(), run.gradient, state["exp_avg"], state["exp_avg_sq"], rounded)


def _in_float64(run: Run, at: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parameter, gradient, exp_avg, exp_avg_sq = (tensor.double() for tensor in run[:4] if tensor is not None)
    gradient = gradient * at.gradient_scale
    exp_avg = at.betas[0] * exp_avg + (1 - at.betas[0]) * gradient
    exp_avg_sq = at.betas[1] * exp_avg_sq + (1 - at.betas[1]) * gradient**2
    corrected = exp_avg / (1 - at.betas[0] ** at.step), exp_avg_sq / (1 - at.betas[1] ** at.step)
    parameter = parameter * (1 - at.lr * at.weight_decay) - at.lr * corrected[0] / (corrected[1].sqrt() + at.eps)
    return parameter, exp_avg, exp_avg_sq


@given(
    size=SIZES, offset=st.integers(0, 17), bf16=st.booleans(), copy=st.booleans(), at=SETTINGS, seed=st.integers(0, 99)
)
def test_a_step_is_torchs(size: int, offset: int, bf16: bool, copy: bool, at: Settings, seed: int) -> None:
    ours = _run(size, bf16=bf16, copy=copy, offset=offset, seed=seed)
    before = _cloned(ours)
    theirs, fused = _by_torch(ours, at), _by_torch(ours, at, fused=True)
    update([ours], at)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(ours.exp_avg, theirs.exp_avg) and torch.equal(ours.exp_avg_sq, theirs.exp_avg_sq)
        # The last elements, less than a vector, are rounded otherwise by torch's fused kernel.
        vectors = size // 16 * 16
        assert torch.equal(ours.parameter[:vectors], fused.parameter[:vectors])
    step = fused.parameter - before.parameter * at.decay
    assert _units(ours.parameter, fused.parameter, before.parameter, step) <= 2
    # Roots that are one unit off count twice or so in the step, and that is all of the parameter where it was small.
    assert _units(ours.parameter, theirs.parameter, before.parameter, step) <= 5
    assert torch.equal(ours.gradient, before.gradient)
    assert ours.copy is None or torch.equal(ours.copy, ours.parameter.bfloat16())


def test_training_is_that_of_torchs_fused_kernel_bit_by_bit() -> None:
    run = _run(64 * 600)
    theirs = torch.nn.Parameter(run.parameter.clone())
    optimizer = torch.optim.AdamW([theirs], fused=True)
    for tensor in (run.exp_avg, run.exp_avg_sq):
        tensor.zero_()
    for step in range(1, 101):
        run.gradient.normal_()
        theirs.grad = run.gradient.clone()
        update([run], Settings(step))
        optimizer.step()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(run.parameter, theirs)
    torch.testing.assert_close(run.parameter, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bf16", [False, True])
def test_every_instruction_set_is_near_float64(library: Any, level: int, bf16: bool) -> None:
    run, at = _run(40_001, bf16=bf16, copy=True, offset=3), Settings(7, lr=0.01, weight_decay=0.1, gradient_scale=0.3)
    before = _cloned(run)
    parameter, exp_avg, exp_avg_sq = _in_float64(run, at)
    update_flat(library, [run], at, level)
    assert _units(run.exp_avg, exp_avg, before.exp_avg, before.gradient) <= 2
    assert _units(run.exp_avg_sq, exp_avg_sq, before.exp_avg_sq) <= 4  # rounded, then squared
    assert _units(run.parameter, parameter, before.parameter, parameter - before.parameter) <= 6
    assert run.copy is not None and torch.equal(run.copy, run.parameter.bfloat16())


def test_wider_instructions_change_no_bit(library: Any) -> None:
    avx2, avx512 = _run(40_001, copy=True), _run(40_001, copy=True)
    for step in range(1, 6):
        update_flat(library, [avx2], Settings(step), 1)
        update_flat(library, [avx512], Settings(step), 2)
    assert _equal(avx2, avx512)


@given(cuts=st.lists(st.integers(0, 40_001), max_size=6), bf16=st.booleans())
def test_pieces_in_any_number_are_the_whole(cuts: list[int], bf16: bool) -> None:
    whole = _run(40_001, bf16=bf16, copy=True)
    pieces = _cloned(whole)
    update([whole], Settings(3))
    ends = [0, *sorted(cuts), 40_001]
    update(
        [Run(*(tensor[a:b] for tensor in pieces if tensor is not None)) for a, b in pairwise(ends)],
        Settings(3),
    )
    assert _equal(whole, pieces)


def test_threads_and_company_change_no_bit(library: Any, two_threads: None) -> None:
    sizes = [1, 0, 70_000, 3, 16_384, 100_003, 17]
    together = [_run(size, bf16=index % 2 == 0, copy=index % 3 == 0) for index, size in enumerate(sizes)]
    alone = [_cloned(run) for run in together]
    update(together, Settings(2))
    torch.set_num_threads(1)
    for run in alone:
        update([run], Settings(2))
    assert all(_equal(a, b) for a, b in zip(together, alone, strict=True))
    update([], Settings(2))


@pytest.mark.parametrize("level", LEVELS)
def test_the_copy_is_rounded_to_nearest_even_and_nan_stays_nan(library: Any, level: int) -> None:
    upper = torch.arange(1 << 16, dtype=torch.int64).repeat_interleave(6)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(1 << 16)
    values = (upper << 16 | lower).to(torch.int32).view(torch.float32)
    zeros = torch.zeros_like(values)
    run = Run(values, zeros, zeros.clone(), zeros.clone(), torch.empty_like(values, dtype=torch.bfloat16))
    before = values.clone()
    update_flat(library, [run], Settings(1, lr=0.0), level)
    assert run.copy is not None and torch.equal(run.parameter.isnan(), before.isnan())
    number = ~before.isnan()
    assert torch.equal(run.parameter[number].view(torch.int32), before[number].view(torch.int32))
    assert torch.equal(run.copy[number].view(torch.int16), before[number].bfloat16().view(torch.int16))
    assert torch.equal(run.copy.isnan(), before.isnan())
    assert torch.equal(run.copy.view(torch.int16) < 0, before.view(torch.int32) < 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_spoils_its_own_element_alone(library: Any, level: int, value: float) -> None:
    run = _run(100, copy=True)
    run.gradient[37] = value
    update_flat(library, [run], Settings(1), level)
    for tensor in (run.parameter, run.copy):
        assert tensor is not None and tensor.isnan().nonzero().tolist() == [[37]]


def test_nothing_beside_a_run_is_touched() -> None:
    whole = _run(300, copy=True)
    before = _cloned(whole)
    update([Run(*(tensor[101:203] for tensor in whole if tensor is not None))], Settings(1))
    for tensor, held in zip(whole, before, strict=True):
        assert tensor is not None and held is not None
        assert torch.equal(tensor[:101], held[:101]) and torch.equal(tensor[203:], held[203:])
    assert not torch.equal(whole.parameter, before.parameter)


def _laid(run: Run, lay: Any) -> Run:
    return Run(*(None if tensor is None else lay(tensor.view(2, 3, 4, 5)) for tensor in run))


@pytest.mark.parametrize(
    "lay",
    [
        lambda tensor: tensor.to(memory_format=torch.channels_last),
        lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3),
        lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
        lambda tensor: tensor[:, :, ::2],
    ],
    ids=["channels_last", "transposed", "with gaps", "every other row"],
)
@pytest.mark.parametrize("other_gradient", [False, True])
def test_tensors_may_lie_in_any_order(lay: Any, other_gradient: bool) -> None:
    run = _laid(_run(120, copy=True), lay)
    if other_gradient:
        run = run._replace(gradient=run.gradient.contiguous())
    expected = Run(*(tensor.contiguous() for tensor in run if tensor is not None))
    for step in (1, 2):
        update([run], Settings(step))
        update([expected], Settings(step))
    assert torch.equal(run.exp_avg, expected.exp_avg) and torch.equal(run.exp_avg_sq, expected.exp_avg_sq)
    torch.testing.assert_close(run.parameter, expected.parameter, rtol=1e-6, atol=1e-7)


def test_tensors_without_bytes_are_updated_by_their_operators() -> None:
    with new_fake_mode():
        run = Run(torch.nn.Parameter(torch.zeros(4)), torch.zeros(4), torch.zeros(4), torch.zeros(4))
        update([run], Settings(1))
    assert version_of(run.parameter) > 0


def test_a_change_is_seen_by_version_counters() -> None:
    run = _run(5, copy=True)
    before = [version_of(tensor) for tensor in run if tensor is not None]
    update([run], Settings(1))
    after = [version_of(tensor) for tensor in run if tensor is not None]
    assert [now > then for now, then in zip(after, before, strict=True)] == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("parameter", torch.zeros(4).double(), "run 1: parameter is torch.float64, not torch.float32"),
        ("gradient", torch.zeros(4).half(), "run 1: gradient is torch.float16, not torch.float32 or torch.bfloat16"),
        ("exp_avg", torch.zeros(3), r"run 1: exp_avg is \[3\] on cpu, parameter \[4\] on cpu"),
        ("exp_avg_sq", torch.zeros(4, device="meta"), r"run 1: exp_avg_sq is \[4\] on meta, parameter \[4\] on cpu"),
        ("copy", torch.zeros(4), "run 1: copy is torch.float32, not torch.bfloat16"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_before_any_is_changed(
    name: str, tensor: torch.Tensor, message: str
) -> None:
    first = _run(4)
    before = _cloned(first)
    with pytest.raises(ValueError, match=message):
        update([first, _run(4)._replace(**{name: tensor})], Settings(1))
    assert _equal(first, before)
