"""`fuse` finds what a mixture of experts spells out, beside a split too, and what is alike it leaves alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import graphopt
from graphopt import Plan
from graphopt.passes.base import PassContext
from graphopt.passes.fuse import Fuse
from tests.support.architectures import ARCHITECTURES
from tests.support.expert_models import Routed, Tower
from tests.support.expert_models import vectors as tower_vectors
from tests.support.experts import OPTIONS, vectors, with_experts
from tests.support.forward import forward_program
from tests.support.split import eager_step, split_program
from tests.support.zoo import VOCABULARY, ZOO, Entry, loss_of

_KINDS = ("route", "sort_by_expert", "permute_tokens", "unpermute_tokens", "grouped_mm")


def _deepseek() -> nn.Module:
    config = hf.DeepseekV3Config(
        vocab_size=VOCABULARY, use_cache=False, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=8,
        num_experts_per_tok=2, n_group=4, topk_group=2, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    return hf.DeepseekV3ForCausalLM(config)


MODELS: dict[str, Entry] = {
    "mixtral": ZOO["mixtral"],
    "qwen3_moe": ARCHITECTURES["qwen3_moe"],
    "deepseek": Entry(_deepseek, ZOO["llama"].batch),
    **{name: Entry(lambda given=given: with_experts(**given), vectors) for name, given in OPTIONS.items()},
    **{
        name: Entry(lambda given=given: Tower(Routed(4, **given)), tower_vectors)
        for name, given in {
            "sorted": {},
            "argsorted": {"spelling": "argsort"},
            "one": {"top": 1},
            "rows left out": {"dropped": True},
        }.items()
    },
}
# Of each kind, by reading the code; each layer has one of all but products, of which it has two.
EXPECTED: dict[str, tuple[int, int, int, int, int]] = {
    "mixtral": (2, 2, 2, 2, 4),
    "qwen3_moe": (1, 1, 1, 1, 2),
    "deepseek": (1, 1, 1, 1, 2),
    "dropless": (0, 1, 1, 1, 0),  # whose router asks for the scores elsewhere; its product is the operator
    "capacity": (0, 1, 1, 1, 0),
    "by weight, with biases": (0, 1, 1, 1, 0),
    "plain, shared": (0, 1, 1, 1, 0),
    "sorted": (1, 1, 1, 1, 2),
    "argsorted": (1, 1, 1, 1, 2),
    "one": (1, 1, 1, 1, 2),
    "rows left out": (1, 1, 1, 1, 2),
}


def _found(entry: Entry) -> tuple[int, ...]:
    program = forward_program(entry)
    context = PassContext(program.placeholders[0].meta["val"].fake_mode, {"dp": 1}, {})
    Fuse().run(program, context)
    return tuple(int(context.statistics.get(kind, 0)) for kind in _KINDS)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found_is_what_is_expected(name: str) -> None:
    assert _found(MODELS[name]) == EXPECTED[name]


def _step(model: nn.Module, batch: dict[str, Any], plan: Plan | None) -> tuple[Tensor, Tensor]:
    model = copy.deepcopy(model)
    if plan is not None:
        model = graphopt.compile(model, plan)
    loss = loss_of(model(**batch))
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("name", [*MODELS])
def test_loss_and_gradients_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name].build(), MODELS[name].batch()
    found, wanted = _step(model, batch, Plan(kernels="auto")), _step(model, batch, None)
    assert all(_apart(*each) < 1e-6 for each in zip(found, wanted, strict=True))


@pytest.mark.parametrize("plan", ["remat=full", pytest.param("dynamic=batch,sequence", marks=pytest.mark.long)])
def test_other_passes_take_the_operators(plan: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS["mixtral"].build(), MODELS["mixtral"].batch()
    found, wanted = _step(model, batch, Plan.parse(f"{plan},kernels=auto")), _step(model, batch, None)
    assert all(_apart(*each) < 1e-6 for each in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["mixtral", "rows left out"])
def test_beside_tokens_that_are_dispatched(name: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name].build().train(), MODELS[name].batch()
    split = split_program(model, batch, 2, ",along=experts", fuse="behind")
    calls = [str(node.target) for node in split.program.compute_nodes()]
    for kind in ("sort_by_expert", "permute_tokens", "unpermute_tokens", "grouped_mm", "rows_out"):
        assert any(call.startswith(f"graphopt.{kind}") for call in calls), kind
    assert split.run().distance(eager_step(model, batch)) < 2e-6


class _Model(nn.Module):
    """A function of logits [6, 8] and rows [12, 5]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(8)), function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x * self.weight, y * self.weight[0])


def _batch() -> dict[str, Tensor]:
    return {"x": torch.randn(6, 8), "y": torch.randn(12, 5)}


def _normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _scores_returned(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    scores = x.softmax(-1)
    return *scores.topk(2), scores


def _back(x: Tensor, y: Tensor, descending: bool = False, other: bool = False) -> Tensor:
    """Weighted rows of 6 tokens, by experts that x prefers."""
    weights, chosen = x.topk(2)
    numbers, order = chosen.view(-1).sort(descending=descending)
    places = torch.empty_like(order)
    places[order] = torch.arange(12)
    places = order if other else places
    ends = torch.histc(numbers.float(), 8, 0, 7).cumsum(0, dtype=torch.int32)
    rows = y * weights.reshape(-1)[order].unsqueeze(-1)
    return rows[places].view(6, 2, 5).sum(1) + ends.sum()


def _of_groups(x: Tensor, y: Tensor, beside: bool) -> Tensor:
    """The best of two groups of four, which lie one behind the other or, for the mask alone, beside each other."""
    scores = x.sigmoid()
    totals = scores.view(-1, 2, 4).topk(2, -1)[0].sum(-1)
    kept = torch.zeros_like(totals).scatter(1, totals.topk(1)[1], 1)
    kept = kept.unsqueeze(1).expand(-1, 4, 2) if beside else kept.unsqueeze(-1).expand(-1, 2, 4)
    open_to = scores.masked_fill(~kept.reshape(-1, 8).bool(), float("-inf"))
    return _normalized(scores.gather(1, open_to.topk(2)[1]))


SAME: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[int, ...]]] = {
    "normalized": (lambda x, y: _normalized(x.softmax(-1).topk(2)[0]), (1, 0, 0, 0, 0)),
    "as they are": (lambda x, y: x.softmax(1).topk(3, 1), (1, 0, 0, 0, 0)),
    "cast before and behind": (
        lambda x, y: _normalized(x.bfloat16().softmax(-1, torch.float).topk(2)[0]).bfloat16(),
        (1, 0, 0, 0, 0),
    ),
    "of the best group": (lambda x, y: _of_groups(x, y, beside=False), (1, 0, 0, 0, 0)),
    "sorted, and back": (_back, (0, 1, 0, 1, 0)),
}
OTHER: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "softmax over tokens": lambda x, y: x.softmax(0).topk(2),
    "the smallest": lambda x, y: x.softmax(-1).topk(2, largest=False),
    "scores read elsewhere": _scores_returned,
    "groups beside each other": lambda x, y: _of_groups(x, y, beside=True),
    "sorted down": lambda x, y: _back(x, y, descending=True),
}


@pytest.mark.parametrize("name", SAME)
def test_one_meaning_in_several_spellings(name: str) -> None:
    function, expected = SAME[name]
    assert _found(Entry(lambda: _Model(function), _batch)) == expected


@pytest.mark.parametrize("name", OTHER)
def test_another_meaning_is_left_alone(name: str) -> None:
    assert not any(_found(Entry(lambda: _Model(OTHER[name]), _batch)))


def test_rows_that_are_not_put_back_in_place_are_not_summed() -> None:
    assert _found(Entry(lambda: _Model(lambda x, y: _back(x, y, other=True)), _batch))[3] == 0
