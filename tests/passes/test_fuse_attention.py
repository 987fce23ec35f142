"""`fuse` sees a sliding window in a mask that a model makes of positions, and in no other mask."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt import Plan
from graphopt.passes.base import PassContext
from graphopt.passes.fuse import Fuse
from graphopt.passes.patterns.attention import window_of
from tests.support.attention import read_pairs
from tests.support.forward import forward_program
from tests.support.kernels import mode
from tests.support.zoo import Entry

_LENGTH = 12
_Mask = Callable[[Tensor, Tensor], Tensor]


class _Model(nn.Module):
    """mask: of the positions of queries, [12, 1], and of keys, [12]. kept: of tokens, an input."""

    def __init__(self, mask: _Mask, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24)
        self.mask, self.dropout = mask, dropout

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        q, k, v = self.projection(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        at = torch.arange(_LENGTH, device=x.device)
        mask = self.mask(at[:, None], at)
        if self.dropout < 0:  # stands for a mask that depends on tokens
            mask = mask & kept[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=max(0.0, self.dropout))


def _fused(mask: _Mask, dropout: float = 0.0) -> dict[str, int | float | str]:
    def batch() -> dict[str, Tensor]:
        return {"x": torch.randn(2, _LENGTH, 8), "kept": torch.rand(2, _LENGTH) < 0.5}

    program = forward_program(Entry(lambda: _Model(mask, dropout), batch))
    context = PassContext(program.placeholders[0].meta["val"].fake_mode, {"dp": 1}, {})
    with mode("reference"):
        Fuse().run(program, context)
    return context.statistics


def _window(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 5)


def test_a_window_is_found_however_it_is_made() -> None:
    assert _fused(_window) == {"attention": 1}
    assert _fused(lambda q, k: torch.where(_window(q, k), 0.0, -torch.inf).expand(2, 1, -1, -1)) == {"attention": 1}
    assert _fused(lambda q, k: torch.ones(_LENGTH, _LENGTH).tril().triu(-4).bool()) == {"attention": 1}


@pytest.mark.parametrize(
    ("mask", "dropout"),
    [
        (lambda q, k: k <= q, 0.0),  # torch's own takes it as well
        (lambda q, k: (k <= q) & (k > q - 5) | (k == 0), 0.0),
        (lambda q, k: (k - q).abs() < 5, 0.0),
        (lambda q, k: torch.where(_window(q, k), 0.0, -5.0), 0.0),
        (_window, 0.5),
        (_window, -1.0),
    ],
)
def test_what_is_no_window_is_left_alone(mask: _Mask, dropout: float) -> None:
    assert _fused(mask, dropout) == {}


@pytest.mark.parametrize(("queries", "keys", "window"), [(6, 6, 1), (6, 6, 5), (3, 9, 4)])
def test_the_window_is_that_of_the_mask(queries: int, keys: int, window: int) -> None:
    read = read_pairs(queries, keys, True, window)
    assert window_of(read) == window_of(read.expand(2, 1, -1, -1)) == window
    assert window_of(torch.zeros(read.shape).masked_fill(~read, torch.finfo(torch.float32).min)) == window
    assert window_of(torch.stack([read, read.roll(1, 1)])) is None
    assert window_of(read_pairs(queries, keys, True)) is None


class _Mean(_Model):
    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return super().forward(x, kept).square().mean()


def test_a_compiled_model_with_a_window_computes_what_eager_does() -> None:
    model = _Mean(_window, 0.0)
    batch = {"x": torch.randn(2, _LENGTH, 8), "kept": torch.ones(2, _LENGTH, dtype=torch.bool)}
    with mode("reference"):
        compiled = graphopt.compile(copy.deepcopy(model), Plan(kernels="auto"))
        found, wanted = compiled(**batch), model(**batch)
        found.backward()
        wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("architecture", "options", "windows"),
    [
        ("Mistral", {}, 2),
        pytest.param(
            "Gemma3", {"layer_types": ["sliding_attention", "full_attention"]}, 1, marks=pytest.mark.long
        ),
    ],
)  # fmt: skip
def test_windows_and_softmax_of_transformers_are_found(
    architecture: str, options: dict[str, Any], windows: int
) -> None:
    """A window in each layer that has one; with eager attention the softmax of each layer instead."""
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(architecture, f"{architecture}Config"))
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "use_cache": False}

    def fused(attention: str) -> dict[str, int | float | str]:
        def build() -> nn.Module:
            given = config(**sizes, **heads, **options, attn_implementation=attention)
            model: nn.Module = getattr(transformers, f"{architecture}ForCausalLM")(given)
            return model

        def batch() -> dict[str, Tensor]:
            tokens = torch.randint(64, (2, 2 * 8))
            return {"input_ids": tokens, "labels": tokens}

        program = forward_program(Entry(build, batch))
        context = PassContext(program.placeholders[0].meta["val"].fake_mode, {"dp": 1}, {})
        with mode("reference"):
            Fuse().run(program, context)
        return context.statistics

    assert fused("sdpa")["attention"] == windows
    assert fused("eager")["softmax"] == 2
