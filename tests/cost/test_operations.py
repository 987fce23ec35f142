"""Operations and bytes against closed forms, and against what PyTorch counts while the model itself runs."""

import math
import operator
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graphopt.cost.operations import Work, contraction_flops, work_of
from graphopt.ir import Program
from tests.ir.built import Hand, functional
from tests.support.programs import lowered
from tests.support.zoo import CONVNET, ROWS, ZOO, Entry, loss_of

aten = torch.ops.aten
FLOAT = 4


def total(program: Program) -> int:
    """Operations of all contractions."""
    return sum(contraction_flops(node) or 0 for node in program.compute_nodes())


def step(model: nn.Module, **batch) -> Program:
    return lowered("zero=0", 1, model, **batch)[1]


def work(target, *shapes: tuple[int, ...], after: Sequence[Any] = ()) -> Work:
    """Of a call on inputs of some shapes, with more arguments `after` them."""
    hand = Hand()
    return work_of(hand.call(target, *[hand.input(*shape) for shape in shapes], *after))


def test_matrix_multiplication() -> None:
    m, k, n = 3, 5, 7
    bytes_ = FLOAT * (m * k + k * n)
    assert work(aten.mm.default, (m, k), (k, n)) == Work(2 * m * n * k, bytes_, FLOAT * m * n, torch.float32)
    assert work(aten.addmm.default, (n,), (m, k), (k, n)).flops == 2 * m * n * k
    assert work(aten.bmm.default, (4, m, k), (4, k, n)).flops == 4 * 2 * m * n * k
    assert work(aten.mv.default, (m, k), (k,)).flops == 2 * m * k
    assert work(aten.linear.default, (2, m, k), (n, k)).flops == 2 * 2 * m * n * k
    assert work(aten.matmul.default, (2, m, k), (k, n)).flops == 2 * 2 * m * n * k


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_and_its_gradients(groups: int, transposed: bool) -> None:
    """Each output element is a sum over the channels of its group and the filter; each gradient takes as much."""
    rows, channels, out, side, width = 3, 8, 16, 9, 3
    filters = (channels, out // groups) if transposed else (out, channels // groups)
    hand = Hand()
    image, weight = hand.input(rows, channels, side, side), hand.input(*filters, width, width)
    how = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], groups)
    node = hand.call(aten.convolution.default, image, weight, None, *how)
    places = side**2 if transposed else math.prod(node.meta["val"].shape[2:])
    flops = 2 * rows * places * out * (channels // groups) * width**2
    assert work_of(node).flops == flops
    for mask, gradients in [((True, True, False), 2), ((False, True, True), 1), ((True, False, False), 1)]:
        back = hand.call(aten.convolution_backward.default, node, image, weight, [out], *how, list(mask))
        assert work_of(back).flops == gradients * flops


def test_integers_multiply_at_their_own_rate() -> None:
    hand = Hand()
    arguments = [hand.input(32, 32), hand.input(32, 64)]
    for node in arguments:
        node.meta["val"] = node.meta["val"].to(torch.int8)
    found = work_of(hand.call(aten._int_mm.default, *arguments))
    assert (found.flops, found.dtype) == (2 * 32 * 32 * 64, torch.int8)


@pytest.mark.parametrize(
    ("first", "second", "offsets", "flops"),
    [
        ((16, 8), (4, 8, 32), True, 2 * 16 * 8 * 32),  # rows of the first belong to groups
        ((8, 16), (16, 32), True, 2 * 8 * 16 * 32),  # what is summed over does: the gradient of the weights
        ((4, 16, 8), (8, 32), True, 2 * 16 * 8 * 32),  # columns of the second do
        ((4, 16, 8), (4, 8, 32), False, 4 * 2 * 16 * 8 * 32),
    ],
)
def test_grouped_multiplication(first, second, offsets: bool, flops: int) -> None:
    hand = Hand()
    arguments = [hand.input(*first), hand.input(*second)]
    for node in arguments:
        node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    if offsets:
        arguments.append(hand.input(4))
        arguments[-1].meta["val"] = arguments[-1].meta["val"].to(torch.int32)
    assert work_of(hand.call(aten._grouped_mm.default, *arguments)).flops == flops


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention(key_heads: int) -> None:
    """Scores and their product with the values; backward makes the scores again, and four products."""
    rows, heads, queries, keys, width = 2, 4, 8, 16, 32
    hand = Hand()
    q = hand.input(rows, heads, queries, width)
    k, v = hand.input(rows, key_heads, keys, width), hand.input(rows, key_heads, keys, width)
    product = 2 * rows * heads * queries * keys * width
    both = hand.call(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v)
    assert work_of(both).flops == 2 * product
    out, sums = (hand.call(operator.getitem, both, index) for index in (0, 1))
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert work_of(hand.call(backward, out, q, k, v, out, sums, 0.0, False)).flops == 5 * product


def test_attention_whose_values_are_wider_than_its_keys() -> None:
    hand = Hand()
    q, k, v = hand.input(2, 4, 8, 32), hand.input(2, 4, 16, 32), hand.input(2, 4, 16, 48)
    whole = hand.call(aten.scaled_dot_product_attention.default, q, k, v)
    assert work_of(whole).flops == 2 * 2 * 4 * 8 * 16 * (32 + 48)


def test_every_other_call_does_an_operation_an_element() -> None:
    assert work(aten.add.Tensor, (3, 1), (1, 5)) == Work(15, FLOAT * 8, FLOAT * 15, torch.float32)
    assert work(aten.sum.dim_IntList, (6, 5), after=([0],)) == Work(30, FLOAT * 30, FLOAT * 5, torch.float32)


def test_what_is_read_twice_or_repeated_is_read_once() -> None:
    hand = Hand()
    row = hand.input(1, 5)
    assert work_of(hand.call(aten.mul.Tensor, row, row)).read_bytes == FLOAT * 5
    wide = hand.call(aten.expand.default, row, [100, 5])
    assert work_of(hand.call(aten.clone.default, wide)) == Work(500, FLOAT * 5, FLOAT * 500, torch.float32)


def test_rows_that_are_looked_up_are_read_and_the_rest_of_the_table_is_not() -> None:
    hand = Hand()
    table, indices = hand.input(1000, 5), hand.input(3)
    indices.meta["val"] = indices.meta["val"].to(torch.int64)
    found = work_of(hand.call(aten.embedding.default, table, indices))
    assert (found.read_bytes, found.written_bytes) == (FLOAT * 15 + 8 * 3, FLOAT * 15)


def test_only_the_shape_is_read_of_what_a_tensor_is_made_like() -> None:
    assert work(aten.new_zeros.default, (1000,), after=([3],)) == Work(3, 0, FLOAT * 3, torch.float32)
    assert work(aten.empty_like.default, (1000,)) == Work(0, 0, 0, torch.float32)


def test_views_items_collectives_and_waits_do_nothing() -> None:
    hand = Hand()
    x = hand.input(4, 6)
    launched = hand.call(functional.all_gather_into_tensor_coalesced.default, [x], 2, "dp")
    turned = hand.call(aten.t.default, x)
    free = [
        launched,
        hand.waited(launched, 0),
        turned,
        hand.call(aten.view.default, x, [24]),
        hand.call(aten._unsafe_view.default, x, [24]),
        hand.call(aten.reshape.default, x, [24]),
        hand.call(aten.slice.Tensor, x, 0, 1, 2),
    ]
    assert all(work_of(node) == Work(0, 0, 0, torch.float32) for node in (x, *free))
    assert work_of(hand.call(aten.reshape.default, turned, [24])).written_bytes == FLOAT * 24, "which must copy"


EAGER_COUNTS = ["llama", "gpt2", "bert", "t5", "vit", "deepseek", "whisper", "odd", "mixed"]


def eager_count(model: nn.Module, entry: Entry) -> int:
    """What PyTorch counts in a step of the model itself."""
    with FlopCounterMode(display=False) as counter:
        loss_of(model(**entry.batch())).backward()
    return int(counter.get_total_flops())


def written_out(entry: Entry) -> nn.Module:
    """The model with its attention as two multiplications, which PyTorch's counter needs on the CPU."""
    model = entry.build().train()
    if isinstance(model, hf.PreTrainedModel):
        model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", EAGER_COUNTS)
def test_a_step_does_what_pytorch_counts_in_the_model(name: str) -> None:
    model = written_out(ZOO[name])
    assert total(step(model, **ZOO[name].batch())) == eager_count(model, ZOO[name])


@pytest.mark.parametrize("name", ZOO)
def test_no_multiplication_of_the_zoo_is_left_out(name: str) -> None:
    """With the attention that the models choose, which PyTorch's counter does not know on the CPU."""
    targets = {node.target: node for node in step(ZOO[name].build().train(), **ZOO[name].batch()).compute_nodes()}
    multiply = [node for target, node in targets.items() if re.search("mm|conv|attention|linear|dot", str(target))]
    assert multiply and all(contraction_flops(node) for node in multiply)


def test_a_convolutional_step_does_what_pytorch_counts() -> None:
    model = CONVNET.build().train()
    assert total(step(model, **CONVNET.batch())) == eager_count(model, CONVNET)


def test_every_grouped_multiplication_of_experts_is_counted() -> None:
    """PyTorch counts none: two of 128 tokens, for two experts each, in each of two layers, and their gradients."""
    model = written_out(ZOO["mixtral"])
    up, down = 64 * 2 * 128, 128 * 64
    grouped = 2 * 3 * 2 * (ROWS * 16 * 2) * (up + down)
    assert total(step(model, **ZOO["mixtral"].batch())) == eager_count(model, ZOO["mixtral"]) + grouped


def llama(width: int = 256, layers: int = 4, attention: str = "eager") -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def tokens(rows: int = 4, length: int = 64) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def test_a_llama_does_six_operations_for_each_parameter_and_token() -> None:
    """6N for each token, and 12 L H Q T for attention (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B).

    N leaves out the table of embeddings, which is not multiplied with. Within 1% for multiplications alone (which do
    not include norms), and within 15% for all operations of so narrow a model.
    """
    model, batch = llama(), tokens()
    parameters = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    expected = batch["input_ids"].numel() * (6 * parameters + 12 * 4 * 256 * 64)
    program = step(model, **batch)
    assert total(program) == pytest.approx(expected, rel=0.01)
    assert sum(work_of(node).flops for node in program.compute_nodes()) == pytest.approx(expected, rel=0.15)


def test_flash_attention_makes_its_scores_once_more() -> None:
    again = 4 * 2 * 4 * 64 * 64 * 256  # layers, operations of a multiply-add, rows, queries, keys, heads times width
    written_out, flash = (total(step(llama(attention=which), **tokens())) for which in ("eager", "sdpa"))
    assert flash == written_out + again


def test_symbolic_sizes_count_as_in_the_example() -> None:
    """And counting binds none of them."""
    batch = {"x": torch.randn(6, 16, requires_grad=True)}
    compilation, symbolic = lowered("zero=0,dynamic=batch", 1, **batch)
    environment = compilation.captured.fake_mode.shape_env
    assert environment is not None
    guards = len(environment.guards)
    _, plain = lowered("zero=0", 1, **batch)
    found = [work_of(node) for node in symbolic.compute_nodes()]
    assert any(not isinstance(s, int) for n in symbolic.placeholders for s in n.meta["val"].shape)
    assert sum(each.flops for each in found) == sum(work_of(node).flops for node in plain.compute_nodes())
    assert total(symbolic) == total(plain) == 3 * 3 * 2 * 6 * 16 * 16
    assert len(environment.guards) == guards
