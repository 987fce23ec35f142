"""The kernels for GPUs over lists of tensors, run on the CPU as loops: against float64, at any size and place."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cuda_ext.cuda import kernels
from graphopt.cuda_ext.lists import TYPES, Run, norm_of_lists, update_lists
from graphopt.cuda_ext.optimizers import Norm, by_operators, gradient_norm, update
from graphopt.cuda_ext.rules import LAMB, SGD, Adagrad, Adam, Lion
from tests.cuda_ext.nearness import random

CPU = torch.device("cpu")
RULES: list[Any] = [
    SGD(0.1),
    SGD(0.1, step=3, momentum=0.9, dampening=0.1, weight_decay=0.01),
    SGD(0.1, step=2, momentum=0.9, weight_decay=0.01, nesterov=True),
    Adagrad(0.1, step=4, lr_decay=0.01, weight_decay=0.01),
    Lion(0.01, weight_decay=0.1),
    Adam(0.1, step=5, weight_decay=0.01),
    Adam(0.1, step=5, weight_decay=0.01, is_decoupled=True),
    LAMB(0.1, step=2, weight_decay=0.01),
]
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([2047, 2048, 4096, 4097, 10_001]))
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(scope="module")
def lists() -> Any:
    found = kernels("optimizers.cu", CPU)
    assert found is not None, "the tests need a C++ compiler"
    return found


def _run(
    rule: Any, size: int, types: tuple[torch.dtype, torch.dtype], copy: torch.dtype | None, offset: int, seed: int
) -> Run:
    """Random values, each tensor `offset` elements into one of its own."""
    values = [random(torch.float32, offset + size, seed=seed + each)[offset:] for each in range(4)]
    states = tuple(state.abs() for state in values[2 : 2 + rule.state_count])
    copies = None if copy is None else torch.zeros(offset + size, dtype=copy)[offset:]
    parameter, gradient = (value.to(dtype) for value, dtype in zip(values, types, strict=False))
    if offset:  # what was cast begins a memory of its own
        parameter, gradient = (torch.cat([each.new_zeros(offset), each])[offset:] for each in (parameter, gradient))
    return Run(parameter, gradient, states, copies)


def _cloned(run: Run) -> Run:
    states = tuple(state.clone() for state in run.states)
    return Run(run.parameter.clone(), run.gradient, states, None if run.copy is None else run.copy.clone())


def _check(run: Run, before: Run, rule: Any, factor: float) -> None:
    parameter, states = before.parameter.double(), [state.double() for state in before.states]
    rule.apply(parameter, before.gradient.double() * factor, states)
    largest = 1 + float(before.parameter.abs().max()) if before.parameter.numel() else 0.0
    assert ((run.parameter.double() - parameter).abs() <= BOUNDS[run.parameter.dtype] * largest).all()
    for state, exact in zip(run.states, states, strict=True):
        torch.testing.assert_close(state.double(), exact, rtol=2e-6, atol=1e-6)
    assert run.copy is None or torch.equal(run.copy, run.parameter.to(run.copy.dtype))


@given(
    rule=st.sampled_from(RULES),
    sizes=st.lists(SIZES, min_size=1, max_size=3),
    types=st.sampled_from(list(TYPES)),
    copy=st.sampled_from([None, torch.bfloat16, torch.float16]),
    offset=st.sampled_from([0, 0, 1, 3]),
    scale=st.sampled_from([None, 0.25]),
)
def test_steps_are_near_float64(
    lists: Any, rule: Any, sizes: list[int], types: Any, copy: torch.dtype | None, offset: int, scale: float | None
) -> None:
    copy = copy if types[0] == torch.float32 else None
    runs = [_run(rule, size, types, copy, offset, 4 * index) for index, size in enumerate(sizes)]
    before = [_cloned(run) for run in runs]
    rule = replace(rule, gradient_scale=0.5)
    update_lists(lists, runs, rule, None if scale is None else torch.tensor(scale), torch.tensor(0.0))
    for run, old in zip(runs, before, strict=True):
        _check(run, old, rule, 0.5 * (1 if scale is None else scale))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_more_runs_than_a_launch_has_room_for(lists: Any, rule: Any) -> None:
    sizes = [(7 * index) % 50 for index in range(140)]
    runs = [_run(rule, size, (torch.float32, torch.float32), None, 0, index) for index, size in enumerate(sizes)]
    before = [_cloned(run) for run in runs]
    update_lists(lists, runs, rule, None, None)
    for run, old in zip(runs, before, strict=True):
        _check(run, old, rule, 1.0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_step_that_is_skipped_changes_nothing(lists: Any, rule: Any) -> None:
    types = (torch.float32, torch.bfloat16)
    run = _run(rule, 5000, types, torch.bfloat16, 0, 0)
    run.gradient[37] = math.inf
    before = _cloned(run)
    skip = gradient_norm([run.gradient]).skip
    for step in (lambda: update_lists(lists, [run], rule, None, skip), lambda: by_operators(run, rule, None, skip)):
        step()
        assert all(torch.equal(a, b) for a, b in zip(run.changed(), before.changed(), strict=True))


@pytest.mark.parametrize("rule", [RULES[3], *RULES[5:]], ids=lambda rule: type(rule).__name__)
def test_a_step_may_be_known_to_the_device_alone(lists: Any, rule: Any) -> None:
    ours = _run(rule, 100, (torch.float32, torch.float32), None, 0, 0)
    theirs = _cloned(ours)
    update_lists(lists, [theirs], rule, None, None)
    known = replace(rule, step=torch.tensor(float(rule.step), dtype=torch.float64))
    update_lists(lists, [ours], known, None, None)
    torch.testing.assert_close(ours.parameter, theirs.parameter, rtol=1e-6, atol=1e-6)


@given(
    sizes=st.lists(st.one_of(st.integers(0, 70), st.sampled_from([8192, 32_768, 100_003])), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    offset=st.sampled_from([0, 1]),
    most=st.sampled_from([None, 0.0, 1.0, 1e9]),
)
def test_norms_are_near_float64(
    lists: Any, sizes: list[int], dtype: torch.dtype, offset: int, most: float | None
) -> None:
    gradients = [random(dtype, offset + size, seed=size)[offset:] for size in sizes]
    exact = float(torch.cat(gradients).double().norm()) * 0.5
    for found in (
        Norm(*norm_of_lists(lists, gradients, most, 0.5)),
        gradient_norm(gradients, most=most, gradient_scale=0.5),
    ):
        assert float(found.norm) == pytest.approx(exact, rel=1e-6)
        share = 1.0 if most is None else min(1.0, most / (exact + 1e-6))
        assert float(found.scale) == pytest.approx(share, rel=1e-6)
        assert float(found.skip) == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 4_000, 40_000])
def test_what_is_not_finite_is_found(lists: Any, value: float, place: int) -> None:
    gradients = [torch.zeros(3, dtype=torch.float16), torch.zeros(40_001)]
    gradients[1][place] = value
    assert float(Norm(*norm_of_lists(lists, gradients, None, 1.0)).skip) == 1


def test_norms_clip_as_torch_does() -> None:
    gradients = [random(torch.float32, size, seed=size) for size in (10, 500)]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 2.0)
    found = gradient_norm(gradients, most=2.0)
    torch.testing.assert_close(found.norm, norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient * found.scale, parameter.grad)


def test_threads_change_no_bit(lists: Any, two_threads: None) -> None:
    rule = LAMB(0.1)
    ours = _run(rule, 50_000, (torch.float32, torch.float32), None, 0, 0)
    theirs = _cloned(ours)
    update_lists(lists, [ours], rule, None, None)
    torch.set_num_threads(1)
    update_lists(lists, [theirs], rule, None, None)
    assert torch.equal(ours.parameter, theirs.parameter)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_need_no_master(rule: Any, dtype: torch.dtype) -> None:
    run = _run(rule, 3000, (dtype, dtype), None, 0, 0)
    before = _cloned(run)
    update([run], rule)
    _check(run, before, rule, 1.0)


def test_norms_of_what_does_not_fit_are_refused() -> None:
    for gradients, most, message in (
        ([], None, "gradients is empty"),
        ([torch.zeros(4)[::2]], None, r"gradients\[0\] is not contiguous"),
        ([torch.zeros(2), torch.zeros(2).double()], None, r"gradients\[1\] is torch.float64"),
        ([torch.zeros(2)], -1.0, "most is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient_norm(gradients, most=most)
