"""SGD, Adagrad, Lion and LAMB in native code, against the same in float64, and against torch's own."""

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt._torch import version_of
from graphopt.cuda_ext.optimizers import Run, update
from graphopt.cuda_ext.rules import LAMB, SGD, Adagrad, Adam, Lion
from tests.cuda_ext.nearness import random

RULES: list[Any] = [
    SGD(0.1),
    SGD(0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    SGD(0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    Adagrad(0.1, lr_decay=0.01, weight_decay=0.01),
    Lion(0.01, weight_decay=0.1),
    Adam(0.1, weight_decay=0.01),
    LAMB(0.1, weight_decay=0.01),
]
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([16_384, 16_385, 40_001]))


def _run(rule: Any, size: int, seed: int = 0, dtype: torch.dtype = torch.float32, has_copy: bool = True) -> Run:
    parameter = random(torch.float32, size, seed=seed)
    states = tuple(torch.zeros(size) for _ in range(rule.state_count))
    copy = torch.zeros(size, dtype=torch.bfloat16) if has_copy else None
    return Run(parameter, random(dtype, size, seed=seed + 1), states, copy)


def _stepped(rule: Any, step: int) -> Any:
    return rule if isinstance(rule, Lion) else replace(rule, step=step)


def _check(rule: Any, runs: list[Run]) -> None:
    wide = [(run.parameter.double(), [state.double() for state in run.states]) for run in runs]
    largest = [float(run.parameter.abs().max()) if run.parameter.numel() else 0.0 for run in runs]
    for step in (1, 2, 3):
        now = _stepped(rule, step)
        update(runs, now)
        for run, (parameter, states) in zip(runs, wide, strict=True):
            now.apply(parameter, run.gradient.double() * now.gradient_scale, states)
    for run, (parameter, states), most in zip(runs, wide, largest, strict=True):
        assert ((run.parameter - parameter).abs() <= 2e-6 * (1 + most)).all()
        for state, exact in zip(run.states, states, strict=True):
            torch.testing.assert_close(state.double(), exact, rtol=2e-6, atol=1e-6)
        assert run.copy is None or torch.equal(run.copy, run.parameter.bfloat16())


@given(
    rule=st.sampled_from(RULES),
    sizes=st.lists(SIZES, max_size=3),
    is_bf16=st.booleans(),
    has_copy=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_steps_are_near_float64(rule: Any, sizes: list[int], is_bf16: bool, has_copy: bool, scale: float) -> None:
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    runs = [_run(rule, size, index, dtype, has_copy) for index, size in enumerate(sizes)]
    _check(replace(rule, gradient_scale=scale), runs)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_instruction_set_is_near_float64(instructions: str, rule: Any) -> None:
    _check(rule, [_run(rule, 20_001)])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_threads_and_company_change_no_bit(two_threads: None, rule: Any) -> None:
    sizes = [70_000, 0, 3, 33_000]
    together, alone = ([_run(rule, size, seed) for seed, size in enumerate(sizes)] for _ in range(2))
    update(together, rule)
    torch.set_num_threads(1)
    for run in alone:
        update([run], rule)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (RULES[0], lambda each: torch.optim.SGD(each, 0.1)),
        (RULES[1], lambda each: torch.optim.SGD(each, 0.1, 0.9, dampening=0.1, weight_decay=0.01)),
        (RULES[2], lambda each: torch.optim.SGD(each, 0.1, 0.9, weight_decay=0.01, nesterov=True)),
        (RULES[3], lambda each: torch.optim.Adagrad(each, 0.1, lr_decay=0.01, weight_decay=0.01)),
        (RULES[5], lambda each: torch.optim.Adam(each, 0.1, weight_decay=0.01)),
    ],
)
def test_training_is_that_of_torch(rule: Any, theirs: Any) -> None:
    run = _run(rule, 1000)
    parameter = torch.nn.Parameter(run.parameter.double())
    optimizer = theirs([parameter])
    for step in range(1, 20):
        run.gradient.normal_()
        parameter.grad = run.gradient.double()
        update([run], _stepped(rule, step))
        optimizer.step()
    torch.testing.assert_close(run.parameter.double(), parameter.detach(), rtol=1e-5, atol=1e-5)


def test_a_step_of_lion_by_hand() -> None:
    run = Run(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, -2.0, 0.0]), (torch.tensor([-1.0, 0.0, 0.0]),))
    update([run], Lion(0.1, (0.5, 0.75), weight_decay=0.5))
    # direction 0.5, -1, 0; decay takes 0.05.
    torch.testing.assert_close(run.parameter, torch.tensor([0.85, 1.05, 0.95]))
    torch.testing.assert_close(run.states[0], torch.tensor([-0.25, -0.5, 0.0]))


def test_a_first_step_of_lamb_is_as_long_as_its_share_of_the_parameter() -> None:
    run = Run(torch.tensor([3.0, 4.0]), torch.tensor([0.5, -0.5]), (torch.zeros(2), torch.zeros(2)))
    update([run], LAMB(0.1, eps=0.0))
    # Adam's first direction is the sign; its length sqrt(2), the parameter's 5.
    apart = 0.1 * 5 / math.sqrt(2)
    torch.testing.assert_close(run.parameter, torch.tensor([3 - apart, 4 + apart]))


@pytest.mark.parametrize("rule", RULES[:6], ids=lambda rule: type(rule).__name__)
def test_a_gradient_that_is_no_number_spoils_its_own_element_alone(rule: Any) -> None:
    run = _run(rule, 100)
    run.gradient[37] = math.nan
    update([run], rule)
    assert run.parameter.isnan().nonzero().tolist() == [[37]]


def test_a_change_is_seen_by_version_counters() -> None:
    run = _run(RULES[1], 5)
    before = [version_of(tensor) for tensor in (run.parameter, run.gradient, *run.states)]
    update([run], RULES[1])
    after = [version_of(tensor) for tensor in (run.parameter, run.gradient, *run.states)]
    assert [now > then for now, then in zip(after, before, strict=True)] == [True, False, True]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_without_a_compiler_torch_computes_the_same_and_one_line_says_so(
    rule: Any, without_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "graphopt"):
        _check(rule, [_run(rule, 100, dtype=torch.bfloat16)])
    (message,) = caplog.messages
    assert "no compiler 'no-such-compiler'" in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parameter", torch.zeros(4).double(), "run 1: parameter is torch.float64, not torch.float32"),
        ("gradient", torch.zeros(3), r"run 1: gradient has the shape \[3\], not \[4\]"),
        ("gradient", torch.zeros(8)[::2], "run 1: gradient is not contiguous"),
        ("states", (), "run 1: states has 0 tensors, Lion has 1"),
        ("states", (torch.zeros(4).bfloat16(),), r"run 1: states\[0\] is torch.bfloat16"),
        ("copy", torch.zeros(4), "run 1: copy is torch.float32, not torch.bfloat16"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_before_any_is_changed(field: str, value: Any, message: str) -> None:
    first = _run(Lion(0.1), 4)
    before = first.parameter.clone()
    with pytest.raises(ValueError, match=message):
        update([first, _run(Lion(0.1), 4)._replace(**{field: value})], Lion(0.1))
    assert torch.equal(first.parameter, before)
