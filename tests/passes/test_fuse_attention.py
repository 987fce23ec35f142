"""`fuse` sees a sliding window in a mask that a model makes of positions, and in no other mask."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
