"""Losses in closed form, room by hand, and biases that even loads out."""

import math

import pytest
import torch

from graphopt.experts import Router, load_balancing_loss, router_z_loss
from graphopt.experts.capacity import beyond_capacity, capacity_of
from graphopt.experts.losses import loads_of


def test_the_load_balancing_loss_of_even_loads_is_top_k_and_of_one_expert_all_of_them() -> None:
    tokens, experts = 12, 4
    even = torch.full((tokens, experts), 1 / experts)
    for top_k in (1, 2, 4):
        chosen = torch.arange(tokens * top_k).reshape(tokens, top_k) % experts
        assert float(load_balancing_loss(even, loads_of(chosen, experts))) == pytest.approx(top_k)
    sharp = torch.zeros(tokens, experts)
    sharp[:, 2] = 1
    assert float(load_balancing_loss(sharp, loads_of(torch.full((tokens, 1), 2), experts))) == pytest.approx(experts)


def test_the_load_balancing_loss_by_hand() -> None:
    """Three tokens, two experts: f = (2/3, 1/3), P = (0.5, 0.5) and then (0.8, 0.2)."""
    loads = torch.tensor([2.0, 1.0])
    assert float(load_balancing_loss(torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]), loads)) == pytest.approx(1.0)
    probabilities = torch.tensor([[0.8, 0.2]] * 3, requires_grad=True)
    loss = load_balancing_loss(probabilities, loads)
    loss.backward()
    assert loss.item() == pytest.approx(2 * (2 / 3 * 0.8 + 1 / 3 * 0.2))
    torch.testing.assert_close(probabilities.grad, torch.tensor([[2 * 2 / 9, 2 * 1 / 9]] * 3))


def test_the_z_loss_in_closed_form() -> None:
    """Of equal logits c it is (c + log n)^2, and its gradient 2 (c + log n) / n for each of n in the mean."""
    logits = torch.full((5, 8), 1.5, dtype=torch.float64, requires_grad=True)
    loss = router_z_loss(logits)
    loss.backward()
    size = 1.5 + math.log(8)
    assert loss.item() == pytest.approx(size**2)
    torch.testing.assert_close(logits.grad, torch.full((5, 8), 2 * size / 8 / 5, dtype=torch.float64))


def test_loads_count_choices_and_leave_out_what_is_no_expert() -> None:
    assert loads_of(torch.tensor([[0, 3], [3, 4], [4, 4]]), 4).tolist() == [1, 0, 0, 2]
    for experts in (2, 3, 7, 64, 1000):
        chosen = torch.arange(experts).repeat_interleave(2)
        assert loads_of(chosen, experts).tolist() == [2] * experts


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "room"), [(1.0, 8, 1, 4, 2), (1.25, 8, 1, 4, 3), (0.1, 8, 2, 16, 1)]
)
def test_room_is_rounded_up(factor: float, tokens: int, top_k: int, experts: int, room: int) -> None:
    assert capacity_of(factor, tokens, top_k, experts) == room


def test_who_comes_first_has_room() -> None:
    chosen = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]])
    assert beyond_capacity(chosen, 3, 2, None).tolist() == [[False, False], [False, False], [True, False], [True, True]]


def test_who_weighs_most_has_room_and_of_equals_who_comes_first() -> None:
    chosen = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]])
    found = beyond_capacity(chosen, 3, 2, weights)
    assert found.tolist() == [[False, False], [False, True], [False, False], [True, True]]


def test_weights_that_are_all_zero_stay_so() -> None:
    """Sigmoids of very negative logits are zero in float32."""
    router = Router(1, 4, 2, scores="sigmoid")
    with torch.no_grad():
        router.weight.fill_(-200.0)
    routing = router(torch.ones(3, 1, requires_grad=True))
    (routing.weights.sum() + routing.balance_loss).backward()
    assert torch.equal(routing.weights, torch.zeros(3, 2)) and bool(router.weight.grad.isfinite().all())


def _lopsided(bias_speed: float) -> tuple[Router, torch.Tensor]:
    """A router that sends most tokens to a few of 8 experts."""
    generator = torch.Generator().manual_seed(0)
    router = Router(16, 8, 2, scores="sigmoid", bias_speed=bias_speed)
    x = torch.randn(512, 16, generator=generator)
    x[:, 0] += 3
    with torch.no_grad():
        router.weight.copy_(torch.randn(8, 16, generator=generator) * 0.2)
    return router, x


def _violation(loads: torch.Tensor) -> float:
    """How far the largest load is above the mean, relative to it: MaxVio of Wang et al. 2024."""
    return float(loads.max() / loads.mean() - 1)


def test_biases_make_loads_even_without_a_loss() -> None:
    router, x = _lopsided(0.01)
    first = router(x)
    for _ in range(150):
        last = router(x)
    assert _violation(first.loads) > 1 and _violation(last.loads) < 0.2
    assert int(last.loads.sum()) == 2 * len(x)


def test_a_step_of_the_bias_is_the_speed_towards_the_mean() -> None:
    router, x = _lopsided(0.5)
    loads = router(x).loads
    assert router.bias.tolist() == [0.5 * (float(load) < 128) - 0.5 * (float(load) > 128) for load in loads]


def test_biases_choose_but_do_not_weigh_and_rest_in_evaluation() -> None:
    router, x = _lopsided(0.1)
    router.eval()
    router.bias.index_fill_(0, torch.tensor(5), 10.0)  # every token's first choice now
    routing = router(x)
    assert bool((routing.chosen[:, 0] == 5).all()) and int(router.bias.count_nonzero()) == 1
    scores = torch.sigmoid(x @ router.weight.t()).gather(1, routing.chosen)
    torch.testing.assert_close(routing.weights, scores / scores.sum(1, keepdim=True))


def test_the_bias_stays_in_float32_when_a_module_is_cast() -> None:
    router, x = _lopsided(0.001)
    router.bias.fill_(0.75)
    router.bfloat16()
    assert router.weight.dtype is torch.bfloat16 and router.bias.dtype is torch.float32
    routing = router(x.bfloat16())
    assert bool((router.bias != 0.75).all()) and routing.weights.dtype is torch.bfloat16
    assert routing.balance_loss.dtype is routing.z_loss.dtype is torch.float32
