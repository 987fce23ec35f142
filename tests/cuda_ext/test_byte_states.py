"""States of one byte: the published codes, the nearest of them, and steps by the kernels for GPUs, run on the CPU."""

import ctypes
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphopt.cuda_ext.byte_states import BLOCK, ByteState, numbers, scale_count
from graphopt.cuda_ext.cuda import kernels
from graphopt.cuda_ext.lists import TYPES, Run, update_lists
from graphopt.cuda_ext.optimizers import by_operators, update
from graphopt.cuda_ext.rules import LAMB, SGD, Adam, Lion
from graphopt.optim import AdamW
from tests.cuda_ext.nearness import random

RULES: list[Any] = [
    SGD(0.1, step=2, momentum=0.9, weight_decay=0.01),
    Lion(0.01, weight_decay=0.1),
    Adam(0.1, step=5, weight_decay=0.01, is_decoupled=True),
]
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 2048, 5000]))


@pytest.fixture(scope="module")
def lists() -> Any:
    found = kernels("byte_optimizers.cu", torch.device("cpu"))
    assert found is not None, "the tests need a C++ compiler"
    found.handle.decoded.restype = ctypes.c_float
    return found


def _decoded(lists: Any, is_signed: bool) -> torch.Tensor:
    function = lists.handle.decoded
    return torch.tensor([function(code, is_signed) for code in range(256)])


@pytest.mark.parametrize("is_signed", [False, True])
def test_codes_are_those_of_the_paper(lists: Any, is_signed: bool) -> None:
    found = _decoded(lists, is_signed)
    torch.testing.assert_close(found, numbers(is_signed), rtol=1e-6, atol=0)
    ordered = found.sort().values
    assert ordered.unique().numel() == 256 and ordered[-1] == 1
    positive = ordered[ordered > 0]
    longest = 6 if is_signed else 7
    for zeros in range(7):  # 2^n equal cells from 0.1 to 1, each stood for by its middle, tenfold smaller at each zero
        cells = positive[(positive > 10.0 ** -(zeros + 1)) & (positive < 10.0**-zeros)]
        edges = torch.linspace(0.1, 1, 2 ** (longest - zeros) + 1, dtype=torch.float64) * 10.0**-zeros
        torch.testing.assert_close(cells.double(), (edges[1:] + edges[:-1]) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_signed", [False, True])
def test_the_nearest_code_is_found(lists: Any, is_signed: bool) -> None:
    every = _decoded(lists, is_signed)
    for code, value in enumerate(every.tolist()):
        assert lists.handle.encoded(_float(value), is_signed) == code
    x = torch.cat([random(torch.float32, 500).abs().clamp(max=1), torch.logspace(-9, 0, 500), torch.zeros(1)])
    x = torch.cat([x, -x]) if is_signed else x
    found = every[[lists.handle.encoded(_float(each), is_signed) for each in x.tolist()]]
    allowed = every if is_signed else every[every > 0]  # squares that are not 0 stay so
    least = (x[:, None] - allowed).abs().amin(1).where(x != 0, 0)
    assert ((found - x).abs() <= least + 1e-6 * x.abs()).all()
    scaled = ByteState.of(x, is_signed=is_signed)
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    within = (blocks / blocks.abs().amax(1, keepdim=True)).view(-1)[: x.numel()]
    apart = (
        every[scaled.codes.long()] - every[[lists.handle.encoded(_float(each), is_signed) for each in within.tolist()]]
    )
    assert (apart.abs() > 1e-6).float().mean() <= 0.01  # but for what lies halfway


def _float(value: float) -> Any:
    return ctypes.c_float(value)


def _run(rule: Any, size: int, types: Any = (torch.float32, torch.float32), copy: Any = None, offset: int = 0) -> Run:
    parameter, gradient = (
        torch.cat([torch.zeros(offset), random(torch.float32, size, seed=seed)]).to(dtype)[offset:]
        for seed, dtype in enumerate(types)
    )
    states = []
    for number in range(rule.state_count):
        values = random(torch.float32, size, seed=2 + number)
        codes, scales = ByteState.of(values.square() if number else values, is_signed=not number)
        states.append(ByteState(torch.cat([codes.new_zeros(offset), codes])[offset:], scales))
    copies = None if copy is None else torch.zeros(offset + size, dtype=copy)[offset:]
    return Run(parameter, gradient, tuple(states), copies)


def _cloned(run: Run) -> Run:
    states = tuple(ByteState(*(part.clone() for part in state)) for state in run.states)
    return Run(run.parameter.clone(), run.gradient, states, None if run.copy is None else run.copy.clone())


def _values(state: torch.Tensor | ByteState, number: int) -> torch.Tensor:
    assert isinstance(state, ByteState)
    return state.values(is_signed=not number)


def _check(run: Run, before: Run, rule: Any) -> None:
    wide = before.parameter.double()
    states = [_values(state, number).double() for number, state in enumerate(before.states)]
    rule.apply(wide, before.gradient.double(), states)
    bound = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[run.parameter.dtype]
    largest = 1 + float(before.parameter.abs().max()) if wide.numel() else 0.0
    assert ((run.parameter.double() - wide).abs() <= bound * largest).all()
    assert run.copy is None or torch.equal(run.copy, run.parameter.to(run.copy.dtype))
    for number, (state, exact) in enumerate(zip(run.states, states, strict=True)):
        blocks = torch.nn.functional.pad(exact, (0, -exact.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        torch.testing.assert_close(state.scales.double(), scales, rtol=2e-6, atol=1e-9)
        every = numbers(not number).double()
        every = every if not number else every[every > 0]
        within = (blocks / scales[:, None]).nan_to_num().view(-1)[: exact.numel()]
        least = (within[:, None] - every).abs().amin(1).where(within != 0, 0)
        found = numbers(not number).double()[state.codes.long()]
        assert ((found - within).abs() <= least + 1e-5 * within.abs() + 1e-9).all()


@given(
    rule=st.sampled_from(RULES),
    sizes=st.lists(SIZES, min_size=1, max_size=3),
    types=st.sampled_from(list(TYPES)),
    copy=st.sampled_from([None, torch.bfloat16, torch.float16]),
    offset=st.sampled_from([0, 0, 1]),
)
def test_steps_are_near_float64(lists: Any, rule: Any, sizes: list[int], types: Any, copy: Any, offset: int) -> None:
    copy = copy if types[0] == torch.float32 else None
    runs = [_run(rule, size, types, copy, offset) for size in sizes]
    before = [_cloned(run) for run in runs]
    update_lists(lists, runs, rule, None, torch.tensor(0.0))
    for run, old in zip(runs, before, strict=True):
        _check(run, old, rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_torchs_operators_do_the_same(rule: Any) -> None:
    run = _run(rule, 1000)
    before = _cloned(run)
    by_operators(run, rule)
    _check(run, before, rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_step_that_is_skipped_changes_nothing(lists: Any, rule: Any) -> None:
    run = _run(rule, 3000)
    before = _cloned(run)
    skip = torch.tensor(1.0)
    for step in (lambda: update_lists(lists, [run], rule, None, skip), lambda: by_operators(run, rule, None, skip)):
        step()
        assert all(torch.equal(a, b) for a, b in zip(run.changed(), before.changed(), strict=True))


def test_a_gradient_that_is_no_number_spoils_its_block_alone() -> None:
    run = _run(RULES[2], 1000)
    run.gradient[300] = math.nan
    for _ in range(2):
        update([run], RULES[2])
    assert run.parameter.isnan().nonzero().view(-1).tolist() == list(range(256, 512))


def test_squares_that_are_small_do_not_become_zero() -> None:
    """A step would be divided by their root, which is eps then."""
    state = ByteState.of(torch.tensor([1.0, 1e-12, 0.0]), is_signed=False)
    assert state.values(is_signed=False)[1] > 0 and state.values(is_signed=False)[2] == 0
    parameter, gradient = torch.zeros(2), torch.tensor([1.0, 1e-5])
    run = Run(parameter, gradient, (ByteState.zeros(parameter), ByteState.zeros(parameter)))
    for step in range(1, 20):
        update([run], Adam(0.1, step=step))
    assert parameter[1].abs() <= 0.1 * 20


def _trained(optimizer_of: Any, steps: int = 150) -> tuple[float, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 4))
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = optimizer_of(model.parameters())
    losses = []
    for _ in range(steps):
        x = torch.randn(128, 16)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20, optimizer


def test_training_reaches_the_loss_of_32_bits_in_a_quarter_of_the_memory() -> None:
    expected, wide = _trained(lambda parameters: AdamW(parameters, lr=3e-3))
    found, narrow = _trained(lambda parameters: AdamW(parameters, lr=3e-3, state_bits=8))
    untrained, _ = _trained(lambda parameters: AdamW(parameters, lr=0.0))
    assert expected < 0.2 * untrained
    assert found == pytest.approx(expected, rel=0.1)

    def size(optimizer: torch.optim.Optimizer) -> int:
        states = optimizer.state.values()
        return sum(each.nbytes for state in states for key, each in state.items() if key != "step")

    elements = sum(parameter.numel() for parameter in wide.param_groups[0]["params"])
    blocks = sum(scale_count(parameter) for parameter in wide.param_groups[0]["params"])
    assert size(wide) == 8 * elements and size(narrow) == 2 * (elements + 4 * blocks)


@pytest.mark.parametrize("rule", [replace(RULES[0], weight_decay=0.0), RULES[1]], ids=["SGD", "Lion"])
def test_other_rules_train_as_with_32_bits(rule: Any) -> None:
    """A quadratic whose curvatures lie decades apart."""
    curvature = torch.logspace(-1, 0.5, 600)
    losses = []
    for has_bytes in (False, True):
        parameter = torch.ones(600)
        state = ByteState.zeros(parameter) if has_bytes else torch.zeros(600)
        for step in range(1, 101):
            now = replace(rule, step=step) if isinstance(rule, SGD) else rule
            update([Run(parameter, curvature * parameter, (state,))], now)
        losses.append(float((curvature * parameter.square()).sum()))
    assert losses[0] < 0.1 * float(curvature.sum()) and losses[1] < 0.1 * float(curvature.sum())


@pytest.mark.parametrize(
    ("rule", "states", "message"),
    [
        (LAMB(0.1), (ByteState.zeros(torch.zeros(4)),) * 2, "LAMB has states in float32 only"),
        (
            Adam(0.1),
            (ByteState.zeros(torch.zeros(4)), torch.zeros(4)),
            r"states\[1\] is a Tensor, states\[0\] a ByteState",
        ),
        (Lion(0.1), (ByteState(torch.zeros(4), torch.zeros(1)),), r"states\[0\].codes is torch.float32"),
        (
            Lion(0.1),
            (ByteState(torch.zeros(4, dtype=torch.uint8), torch.zeros(2)),),
            r"states\[0\].scales has the shape",
        ),
    ],
)
def test_states_that_do_not_fit_are_named(rule: Any, states: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        update([Run(torch.zeros(4), torch.zeros(4), states)], rule)
