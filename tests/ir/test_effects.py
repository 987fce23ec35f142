"""Effects of calls that depend on their arguments."""

import torch
from torch import fx

from graphopt.ir import Effect, effect_of


def test_attention_draws_numbers_only_for_dropout() -> None:
    graph = fx.Graph()
    q = graph.placeholder("q")
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert effect_of(graph.call_function(attention, (q, q, q))) is Effect.PURE
    assert effect_of(graph.call_function(attention, (q, q, q, None, 0.1))) is Effect.RANDOM
    assert effect_of(graph.call_function(attention, (q, q, q), {"dropout_p": 0.1})) is Effect.RANDOM
    assert effect_of(graph.call_function(torch.ops.aten.native_dropout.default, (q, 0.1, True))) is Effect.RANDOM
