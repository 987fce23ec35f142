"""Masks that are causal are found, and only those."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphopt.capture.arguments import flatten_call, tensor_names
from graphopt.capture.export import capture
from graphopt.ir import Program
from graphopt.passes.causal_masks import causal_calls, state_causal

ROWS = 6
Mask = Callable[[torch.Tensor], torch.Tensor]


class _Attention(nn.Module):
    def __init__(self, mask: Mask, columns: int = ROWS) -> None:
        super().__init__()
        self.mask, self.columns = mask, columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = torch.cat([x] * (self.columns // ROWS), 2)
        return nn.functional.scaled_dot_product_attention(x, keys, keys, self.mask(x))


def _captured(module: nn.Module, x: torch.Tensor) -> Program:
    tensors, spec = flatten_call((x,), {})
    return capture(module, tensors, spec, tensor_names(module.forward, (x,), {})).program


def _positions() -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(ROWS)
    return at[:, None], at[None, :]


def _before(x: torch.Tensor) -> torch.Tensor:
    rows, columns = _positions()
    return columns <= rows


def _from(x: torch.Tensor) -> torch.Tensor:
    rows, columns = _positions()
    return (rows + 1 > columns).expand(x.shape[0], 1, -1, -1)


def _wide_window(x: torch.Tensor) -> torch.Tensor:
    rows, columns = _positions()
    return (columns > rows - 2 * ROWS) & (columns <= rows)


def _one_document(x: torch.Tensor) -> torch.Tensor:
    """As models of Transformers say it: positions that follow each other are of one document."""
    at = torch.arange(ROWS).expand(x.shape[0], -1)
    document = (at.diff(prepend=at[:, :1] - 1) != 1).cumsum(-1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return torch.ones_like(x[:, :1, :1, :1], dtype=torch.bool) & same & (at[:, None, None, :] <= at[:, None, :, None])


def _two_documents(x: torch.Tensor) -> torch.Tensor:
    document = (torch.arange(ROWS) > 2)[None, :]
    return (document.mT == document) & _before(x)


CAUSAL = [_before, _from, _wide_window, _one_document, lambda x: torch.ones(ROWS, ROWS, dtype=torch.bool).tril()]
OTHERS = [
    _two_documents,
    lambda x: _before(x).mT,
    lambda x: _positions()[1] < _positions()[0] + 2,
    lambda x: _positions()[1] < _positions()[0],
    lambda x: (_positions()[1] > _positions()[0] - 3) & _before(x),
    lambda x: _positions()[1] <= _positions()[0].flip(0),
    lambda x: (x[0, 0, :, :1] > 0) | _before(x),
    lambda x: _positions()[1] >= 0,
    lambda x: _before(x).float(),
]


@pytest.mark.parametrize("mask", CAUSAL)
def test_causal_masks_are_known(mask: Mask) -> None:
    module, x = _Attention(mask), torch.randn(2, 3, ROWS, 4)
    program = _captured(module, x)
    (call,) = causal_calls(program)
    state_causal(call)
    program.module.recompile()
    (found,) = program.module(x)
    torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize("mask", OTHERS)
def test_others_are_not(mask: Mask) -> None:
    assert not causal_calls(_captured(_Attention(mask), torch.randn(2, 3, ROWS, 4)))


def test_a_mask_over_more_keys_than_queries_is_not() -> None:
    module = _Attention(lambda x: torch.ones(ROWS, 2 * ROWS, dtype=torch.bool).tril(), 2 * ROWS)
    assert not causal_calls(_captured(module, torch.randn(2, 3, ROWS, 4)))


def test_long_masks_are_known_without_being_made() -> None:
    """A million rows: what compares each with each would not fit into memory."""
    rows = 1 << 20

    def mask(x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(rows, device=x.device)
        return at <= at[:, None]

    with torch.device("meta"):
        program = _captured(_Attention(mask), torch.empty(1, 1, rows, 4))
    assert len(causal_calls(program)) == 1
