"""The block beside a mixture of experts written out, and what it does with loads of any kind."""

import io
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from graphopt.experts import ACTIVATIONS, PRIORITIES, SCORES, Experts
from tests.experts.reference import reference

HIDDEN = 6


def _block(experts: int = 5, top_k: int = 2, **options: Any) -> Experts:
    torch.manual_seed(0)
    return Experts(HIDDEN, 7, experts, top_k, dtype=torch.float64, **options)


def _tokens(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()


def _check_against_reference(block: Experts, x: torch.Tensor) -> None:
    """Outputs, losses and all gradients, in evaluation, where no bias moves."""
    block.eval()
    wanted = reference(block, x)
    y, routing = block(x)
    found = (y, routing.balance_loss, routing.z_loss)
    inputs = [x, *block.parameters()]
    gradients = []
    for output in (found, wanted):
        torch.manual_seed(2)
        mixed = (output[0] * torch.randn_like(output[0])).sum() + output[1] + output[2]
        gradients.append(torch.autograd.grad(mixed, inputs))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_outputs_losses_and_gradients_are_those_of_a_loop_over_tokens(data) -> None:
    experts = data.draw(st.integers(2, 6), "experts")
    block = _block(
        experts,
        data.draw(st.integers(1, experts), "top_k"),
        gated=data.draw(st.booleans(), "gated"),
        activation=data.draw(st.sampled_from(sorted(ACTIVATIONS)), "activation"),
        shared=data.draw(st.integers(0, 2), "shared"),
        scores=data.draw(st.sampled_from(sorted(SCORES)), "scores"),
        normalized=data.draw(st.booleans(), "normalized"),
        capacity=data.draw(st.sampled_from([None, 0.1, 0.5, 1.0, 1.5]), "capacity"),
        priority=data.draw(st.sampled_from(PRIORITIES), "priority"),
        bias_speed=data.draw(st.sampled_from([0.0, 0.1]), "bias_speed"),
    )
    if block.router.bias is not None:
        block.router.bias.normal_()
    _check_against_reference(block, _tokens(data.draw(st.integers(1, 3), "rows"), data.draw(st.integers(1, 4), "each")))


def _all_to(block: Experts, *experts: int) -> None:
    """Have every token with a positive sum choose these, the first most."""
    with torch.no_grad():
        block.router.weight.fill_(-1.0)
        for place, expert in enumerate(experts):
            block.router.weight[expert] = len(experts) - place


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_all_tokens_may_go_to_the_same_experts_and_none_to_the_others(capacity: float | None) -> None:
    block = _block(capacity=capacity)
    _all_to(block, 3, 1)
    x = _tokens(8).detach().abs().requires_grad_()
    _check_against_reference(block, x)
    y, routing = block(x)
    assert routing.loads.tolist() == [0, 8, 0, 8, 0]
    for gradient in torch.autograd.grad(y.sum(), (block.up, block.down)):
        assert [expert for expert in range(5) if gradient[expert].any()] == [1, 3]


def test_without_room_a_token_gets_nothing_but_of_the_shared_experts() -> None:
    block = _block(capacity=0.5, shared=1)  # ceil(0.5 * 8 * 2 / 5): two tokens an expert
    _all_to(block, 3, 1)
    x = _tokens(8).detach().abs()
    y, routing = block(x)
    assert routing.chosen.tolist() == [[3, 1]] * 2 + [[5, 5]] * 6
    assert torch.equal(routing.weights[2:], torch.zeros(6, 2, dtype=torch.float64))
    assert torch.equal(y[2:], block.shared(x)[2:])
    assert not torch.equal(y[:2], block.shared(x)[:2])


def test_experts_that_nobody_chooses_take_no_part() -> None:
    """Numbers that would spoil every product stay where they are."""
    block = _block(capacity=0.5)
    _all_to(block, 3, 1)
    x = _tokens(8).detach().abs()
    expected = block(x)[0][:2]
    with torch.no_grad():
        block.up[[0, 2, 4]] = torch.nan
    y = block(x)[0]
    assert torch.equal(y[:2], expected) and torch.equal(y[2:], torch.zeros(6, HIDDEN, dtype=torch.float64))


def test_mixtral_with_the_same_weights_gives_the_same() -> None:
    torch.manual_seed(0)
    config = hf.MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(config)
    ours = Experts(16, 24, 4, 2)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    weights = dict(theirs.named_parameters())
    ours.load_state_dict(
        {
            "router.weight": weights["gate.weight"],
            "up": weights["experts.gate_up_proj"],
            "down": weights["experts.down_proj"],
        }
    )
    x = torch.randn(3, 5, 16)
    given = theirs(x)
    torch.testing.assert_close(ours(x)[0], given[0] if isinstance(given, tuple) else given)


def test_a_state_dict_goes_round() -> None:
    block = _block(bias_speed=0.1, shared=1)
    for _ in range(3):
        block(_tokens(9))
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = Experts(HIDDEN, 7, 5, 2, dtype=torch.float64, bias_speed=0.1, shared=1)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.router.bias, block.router.bias) and block.router.bias.any()
    assert torch.equal(other.eval()(_tokens(9))[0], block.eval()(_tokens(9))[0])


def test_parameters_are_drawn_as_those_of_linear_layers_and_anew_on_the_device_they_are_moved_to() -> None:
    with torch.device("meta"):
        block = Experts(400, 100, 4, 2, shared=2, bias_speed=0.1)
    block.to_empty(device="cpu")
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        block.reset_parameters()
        drawn.append({name: value.clone() for name, value in block.state_dict().items()})
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
    bounds = {"router.weight": 400, "up": 400, "down": 100, "shared.up.weight": 400, "shared.down.weight": 200}
    for name, width in bounds.items():
        assert 0.95 < float(drawn[0][name].abs().max()) * width**0.5 <= 1, name
        assert abs(float(drawn[0][name].std()) * (3 * width) ** 0.5 - 1) < 0.05, name
    assert not drawn[0]["router.bias"].any()


def test_under_autocast_products_are_in_its_dtype() -> None:
    block = _block().float()
    x = _tokens(9).detach().float()
    exact = block(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = block(x.bfloat16())[0]
        assert block(x)[0].dtype is torch.float32, "as the tokens are in"
    assert found.dtype is torch.bfloat16
    apart = (found.float() - exact).norm() / exact.norm()
    assert 1e-4 < apart.item() < 5e-2


def test_a_block_says_what_it_is() -> None:
    shown = repr(_block(capacity=1.5, priority="weight", bias_speed=0.01, activation="gelu", shared=1))
    assert "Router(6, 5, top_k=2, scores='softmax', normalized=True, capacity=1.5, priority='weight'" in shown
    assert "bias_speed=0.01" in shown and "activation='gelu'" in shown and "up=[5, 14, 6]" in shown


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((6, 7, 4, 5), {}, "top_k is 5, but there are 4 experts; the nearest is 4"),
        ((6, 7, 4, 0), {}, "top_k is 0"),
        ((6, 7, 1, 1), {}, "experts is 1"),
        ((0, 7, 4, 2), {}, "hidden is 0"),
        ((6, 0, 4, 2), {}, "intermediate is 0"),
        ((6, 7, 4, 2), {"shared": -1}, "shared is -1"),
        ((6, 7, 4, 2), {"activation": "sillu"}, "activation is 'sillu'; the nearest is 'silu'"),
        ((6, 7, 4, 2), {"scores": "sigmoids"}, "scores is 'sigmoids'; the nearest is 'sigmoid'"),
        ((6, 7, 4, 2), {"priority": "ordered"}, "priority is 'ordered'; the nearest is 'order'"),
        ((6, 7, 4, 2), {"capacity": 0.0}, "capacity is 0.0"),
        ((6, 7, 4, 2), {"capacity": float("nan")}, "capacity is nan"),
        ((6, 7, 4, 2), {"bias_speed": -0.1}, "bias_speed is -0.1"),
    ],
)
def test_what_cannot_be_made_is_an_error_that_says_what_can(arguments, options, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Experts(*arguments, **options)


def test_tokens_of_another_width_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 5\], but its last dimension must be hidden, 6"):
        _block()(torch.zeros(2, 5, dtype=torch.float64))
