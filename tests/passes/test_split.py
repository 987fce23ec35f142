"""A split step computes what the model does, whatever is hard to split in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.split import eager_step, split_program
from tests.support.split_models import ATTENTION, MLPS, Blocks, Convolutions, images, tokens
from tests.support.zoo import ZOO

BOUND = 2e-6


def _distance(build: Callable[[], nn.Module], batch: Callable[[], dict[str, Any]], ranks: int, options: str) -> float:
    torch.manual_seed(0)
    model, given = build().train(), batch()
    return split_program(model, given, ranks, options).run().distance(eager_step(model, given))


@pytest.mark.parametrize("name", ZOO)
def test_a_split_step_gives_the_loss_and_gradients_of_eager(name: str) -> None:
    assert _distance(ZOO[name].build, ZOO[name].batch, 4, "") <= BOUND


@pytest.mark.parametrize(
    ("attention", "ranks", "options"),
    [
        ("one head of keys", 4, ""),
        ("two heads of keys", 4, ""),
        ("two heads of keys, grouped", 4, ""),
        ("two heads of keys", 2, ",along=sequence"),
        ("one head of keys, grouped", 2, ",along=heads"),
        ("five heads", 2, ""),
        ("six heads", 4, ",sequence=true"),
        ("six heads, three of keys", 2, ""),
        ("fused, grouped", 2, ",along=heads"),
        ("fused, Conv1D", 4, ""),
        ("dropout, six heads", 2, ""),
        ("dropout", 2, ",along=sequence"),
    ],
)
def test_attention(attention: str, ranks: int, options: str) -> None:
    assert _distance(lambda: Blocks(ATTENTION[attention]()), tokens, ranks, options) <= BOUND


@pytest.mark.parametrize(("attention", "heads"), [("dropout", 4), ("dropout, six heads", 6)])
def test_attention_that_drops_scores_is_shared_by_the_ranks(attention: str, heads: int) -> None:
    torch.manual_seed(0)
    model, given = Blocks(ATTENTION[attention]()).train(), tokens()
    split = split_program(model, given, 2, "")
    shares = [node.meta["val"].shape for node in split.program.compute_nodes() if "softmax.default" in str(node.target)]
    assert (2, heads // 2, 16, 16) in map(tuple, shares)
    assert split.run().distance(eager_step(model, given)) <= BOUND


@pytest.mark.parametrize("mlp", MLPS)
def test_products_of_sizes_that_ranks_do_not_divide(mlp: str) -> None:
    assert _distance(lambda: Blocks(MLPS[mlp](), norm=nn.LayerNorm, vocabulary=41, tied=True), tokens, 4, "") <= BOUND


@pytest.mark.parametrize("options", ["", ",sequence=true", ",along=sequence"])
def test_dropout_draws_what_one_device_would(options: str) -> None:
    assert _distance(lambda: Blocks(MLPS["even"](), dropout=0.25), tokens, 4, options) <= BOUND


@pytest.mark.parametrize("options", [",sequence=true", ",along=sequence", ",along=heads"])
def test_a_sequence_that_ranks_do_not_divide(options: str) -> None:
    def batch() -> dict[str, Any]:
        return tokens(length=17)

    assert _distance(lambda: Blocks(ATTENTION["fused"](), MLPS["even"]()), batch, 2, options) <= BOUND


@pytest.mark.parametrize(
    ("vocabulary", "loss"),
    [
        (40, {"label_smoothing": 0.1}),
        (40, {"reduction": "none"}),
        (41, {"reduction": "sum", "ignore_index": -100}),
        (41, {"label_smoothing": 0.1}),
        (41, {"dtype": torch.bfloat16}),
    ],
)
def test_cross_entropy_of_parts_of_the_vocabulary(vocabulary: int, loss: dict[str, Any]) -> None:
    def build() -> nn.Module:
        return Blocks(vocabulary=vocabulary, logits=False, **loss)

    assert _distance(build, lambda: {**tokens(vocabulary, 200)}, 2, ",column=head") <= BOUND


@pytest.mark.parametrize(
    ("options", "frequencies"),
    [(",row=embedding", False), ("", True), (",along=sequence", False), (",along=sequence", True)],
)
def test_lookups_have_the_gradients_of_eager(options: str, frequencies: bool) -> None:
    assert _distance(lambda: Blocks(frequencies=frequencies), tokens, 2, options) <= BOUND


@pytest.mark.parametrize(("channels", "groups", "ranks"), [(8, 1, 4), (8, 8, 4), (8, 2, 4), (9, 3, 2)])
def test_convolutions(channels: int, groups: int, ranks: int) -> None:
    assert _distance(lambda: Convolutions(channels, groups, norm=ranks == 2), images, ranks, "") <= BOUND
