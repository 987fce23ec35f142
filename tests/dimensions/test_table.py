"""What the table says of operators that models are made of, word for word."""

from typing import Any

import pytest
import torch

from graphopt.dimensions.signature import Dimensions, Signature
from graphopt.dimensions.table import signature_of
from tests.dimensions.calls import indices, real
from tests.support.parts import node_of

aten = torch.ops.aten


def written(signature: Signature | None) -> str:
    """As in the table's own notation, with what cannot be split in capitals."""
    assert signature is not None

    def of(dimensions: Dimensions) -> str:
        labels = [[name.upper() if name in signature.whole else name for name in dim] for dim in dimensions]
        return " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in labels)

    return f"{', '.join(map(of, signature.operands))} -> {', '.join(map(of, signature.results))}"


CASES: list[tuple[str, Any, tuple[Any, ...]]] = [
    ("d0 d1 k, n k, n -> d0 d1 n", aten.linear.default, (real(2, 3, 4), real(5, 4), real(5))),
    ("n, m k, k n -> m n", aten.addmm.default, (real(5), real(3, 4), real(4, 5))),
    ("d0 d1 m k, d1 k n -> d0 d1 m n", aten.matmul.default, (real(2, 3, 4, 5), real(3, 5, 6))),
    ("d0 d1 d2, d2 -> d0 d1 d2", aten.mul.Tensor, (real(2, 3, 4), real(4))),
    ("d0 d1, d0 () -> d0 d1", aten.div.Tensor, (real(2, 3), real(2, 1))),
    ("x0 x1 (x2 x3) -> x0 x1 x2 x3", aten.view.default, (real(2, 3, 20), [2, 3, 4, 5])),
    ("x0 x1 x2 -> (x0 x1) x2", aten.reshape.default, (real(2, 3, 4), [-1, 4])),
    ("(x0 W1) W3 -> (x0 W2) W4", aten.reshape.default, (real(4, 6), [6, 4])),
    ("d0 d1 d2 d3 -> d0 d2 d1 d3", aten.transpose.int, (real(2, 3, 4, 5), 1, 2)),
    ("d0 () d2 -> d0 d1 d2", aten.expand.default, (real(2, 1, 4), [2, 3, 4])),
    ("d0 (PIECE part) -> d0 part, d0 part", aten.split.Tensor, (real(2, 6), 3, 1)),
    ("d0 W1 -> d0 W2, d0 W3", aten.split_with_sizes.default, (real(2, 6), [4, 2], 1)),
    ("d0 part, d0 part -> d0 (PIECE part)", aten.cat.default, ([real(2, 3), real(2, 3)], 1)),
    ("d0 W1 -> d0 W2", aten.slice.Tensor, (real(2, 6), 1, 0, 3)),
    ("d0 d1 D2, D2, D2 -> d0 d1 D2", aten.layer_norm.default, (real(2, 3, 4), [4], real(4), real(4))),
    ("d0 D1 -> d0 D1", aten.softmax.int, (real(2, 3), -1)),
    ("d0 d1 -> d0 ()", aten.sum.dim_IntList, (real(2, 3), [1], True)),
    ("v h, d0 d1 -> d0 d1 h", aten.embedding.default, (real(7, 4), indices(7, 2, 3))),
    ("n c, n -> ", aten.cross_entropy_loss.default, (real(4, 5), indices(5, 4), None, 2)),
    ("n c, n, c -> n", aten.cross_entropy_loss.default, (real(4, 5), indices(5, 4), real(5).abs(), 0)),
    ("n C, n C -> n", aten.cross_entropy_loss.default, (real(4, 5), real(4, 5).softmax(1), None, 0)),
    (
        "d0 h s D, d0 h T D, d0 h T e, d0 () s T -> d0 h s e",
        aten.scaled_dot_product_attention.default,
        (real(2, 4, 3, 5), real(2, 4, 6, 5), real(2, 4, 6, 7), real(2, 1, 3, 6)),
    ),
    (
        "d0 (g r) s D, d0 g T D, d0 g T e -> d0 (g r) s e",
        aten.scaled_dot_product_attention.default,
        (real(2, 4, 3, 5), real(2, 2, 6, 5), real(2, 2, 6, 7), {"enable_gqa": True}),
    ),
    ("n i W3, o i W4, o -> n o W5", aten.conv1d.default, (real(2, 3, 8), real(4, 3, 2), real(4))),
    (
        "n g W2, g () W3, g -> n g W4",
        aten.conv1d.default,
        (real(2, 4, 8), real(4, 1, 2), real(4), [1], [0], [1], 4),
    ),
    (" -> d0 d1", aten.zeros.default, ([2, 3],)),
    (" -> W0", aten.arange.default, (4,)),
]


@pytest.mark.parametrize(("text", "target", "arguments"), CASES, ids=[f"{t.name()} {s}" for s, t, _ in CASES])
def test_signature(text: str, target: Any, arguments: tuple[Any, ...]) -> None:
    named = arguments[-1] if isinstance(arguments[-1], dict) else {}
    given = arguments[:-1] if named else arguments
    assert written(signature_of(node_of(target, *given, **named))) == text


def test_a_mean_must_be_rescaled_and_its_sum_not() -> None:
    mean, total = (signature_of(node_of(packet.dim if packet is aten.mean else packet.dim_IntList, real(2, 3), [1]))
                   for packet in (aten.mean, aten.sum))  # fmt: skip
    assert mean is not None and mean.localized == {"d1"} and mean.is_reduced("d1")
    assert total is not None and not total.localized and total.is_reduced("d1")


def test_a_bias_is_an_addend_and_goes_with_each_factor() -> None:
    signature = signature_of(node_of(aten.linear.default, real(3, 4), real(5, 4), real(5)))
    assert signature is not None and signature.addends == {2}
    assert signature.linear == (frozenset({0, 2}), frozenset({1, 2}))


@pytest.mark.parametrize("target", [aten.add.Tensor, aten.sub.Tensor])
def test_a_number_is_not_added_to_each_summand(target: Any) -> None:
    number, tensor = (signature_of(node_of(target, real(3), other)) for other in (1, real(3)))
    assert number is not None and number.linear == ()
    assert tensor is not None and tensor.linear == (frozenset({0, 1}),)


def test_sums_are_of_floating_numbers() -> None:
    signature = signature_of(node_of(aten.mul.Tensor, indices(5, 3), 2))
    assert signature is not None and signature.linear == ()


def test_causal_attention_and_dropout_are_not_simply_split() -> None:
    query = real(2, 4, 6, 8)
    causal = signature_of(node_of(aten.scaled_dot_product_attention.default, query, query, query, is_causal=True))
    dropping = signature_of(node_of(aten.scaled_dot_product_attention.default, query, query, query, dropout_p=0.1))
    assert causal is not None and causal.localized == {"s"}
    assert dropping is not None and dropping.localized == {"d0", "h", "s", "e"} and dropping.linear == ()


def test_dropout_is_random_in_training_alone() -> None:
    calls = [node_of(aten.dropout.default, real(2, 3), 0.5, train) for train in (False, True)]
    idle, drawn = map(signature_of, calls)
    assert idle is not None and not idle.localized and idle.linear == (frozenset({0}),)
    assert drawn is not None and drawn.localized == {"d0", "d1"} and not drawn.linear


def test_an_operator_that_nobody_described_has_no_signature() -> None:
    assert signature_of(node_of(aten.linalg_svdvals.default, real(3, 3))) is None
    assert signature_of(node_of(aten.index.Tensor, real(3), [real(3) > 0])) is None  # its shape depends on values


def test_arguments_by_name_are_in_the_order_they_are_given() -> None:
    mask, query = real(3, 6), real(2, 4, 3, 5)
    others = {"attn_mask": mask, "key": real(2, 4, 6, 5), "value": real(2, 4, 6, 7)}
    signature = signature_of(node_of(aten.scaled_dot_product_attention.default, query, **others))
    assert written(signature) == "d0 h s D, s T, d0 h T D, d0 h T e -> d0 h s e"
