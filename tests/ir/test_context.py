"""Attention over a folded sequence is the attention of the whole, and so are its gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from graphopt.cost.operations import contraction_flops
from graphopt.emit.split import split
from graphopt.inspect.exchanges import Exchanges
from graphopt.ir import Effect, OutputKind, Phase, context, effect_of
from graphopt.ir.collectives import collectives_of
from graphopt.runtime.folded import attention, attention_backward, plain_attention, plain_attention_backward
from tests.support.moved import ATTENTION_SHAPE, Values, attention_program, results, step

BATCH, WIDTH = ATTENTION_SHAPE


def _drawn(ranks: int, rows: int, heads: int) -> torch.Tensor:
    return torch.randn(BATCH, heads, ranks * rows, WIDTH, dtype=torch.float64)


def _parts(whole: torch.Tensor, ranks: int) -> Values:
    """Of rank r chunks r and 2 * ranks - 1 - r."""
    chunks = whole.chunk(2 * ranks, 2)
    return [torch.cat([chunks[rank], chunks[-1 - rank]], 2) for rank in range(ranks)]


SHAPES = [(2, 4, 2, 2, None), (2, 2, 4, 2, 0.3), (3, 6, 3, 1, None), (4, 4, 4, 2, None)]


@pytest.mark.parametrize(("ranks", "rows", "heads", "key_heads", "scale"), SHAPES)
def test_it_is_the_attention_of_the_whole(
    ranks: int, rows: int, heads: int, key_heads: int, scale: float | None
) -> None:
    wholes = [_drawn(ranks, rows, count).requires_grad_() for count in (heads, key_heads, key_heads)]
    wanted = scaled_dot_product_attention(*wholes, is_causal=True, scale=scale, enable_gqa=True)  # type: ignore[misc]
    tangent = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, wholes, tangent)

    program, mode = attention_program(ranks, rows, heads, key_heads, scale)
    inputs = [_parts(whole.detach(), ranks) for whole in wholes]
    (forward,) = results(program, {"cp": ranks}, inputs)
    step(program, mode, {"cp": ranks})
    found = results(program, {"cp": ranks}, [*inputs, _parts(tangent, ranks)])
    for whole, parts in zip([wanted.detach(), wanted.detach(), *gradients], [forward, *found], strict=True):
        for one, other in zip(_parts(whole, ranks), parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_part_of_what_is_folded_is_a_chunk_of_either_end(blocks: int) -> None:
    ranks, whole = 3, torch.arange(5 * blocks * 12).view(5, blocks * 12).requires_grad_(False)
    folded = context.FOLD(whole, 1, blocks, ranks)
    assert torch.equal(context.UNFOLD(folded, 1, blocks, ranks), whole)
    parts = Exchanges({"cp": ranks}).own("own_part", [folded] * ranks, 1, blocks, 4, ranks, "cp")
    for rank, part in enumerate(parts):
        chunks = whole.unflatten(1, (blocks, 2 * ranks, 2))
        assert torch.equal(part.unflatten(1, (blocks, 2, 2)), chunks[:, :, [rank, 2 * ranks - 1 - rank]])


def test_a_step_saves_own_keys_and_gathers_all_twice() -> None:
    program, mode = attention_program(2, 4, 2, 2, None)
    step(program, mode, {"cp": 2})
    kinds = [(each.phase, each.kind) for each in collectives_of(program)]
    assert kinds == [(Phase.FORWARD, "all-gather")] * 2 + [
        (Phase.BACKWARD, "all-gather"), (Phase.BACKWARD, "all-gather"),
        (Phase.BACKWARD, "reduce-scatter"), (Phase.BACKWARD, "reduce-scatter"),
    ]  # fmt: skip
    saved = split(program).forward.results_of(OutputKind.SAVED)
    assert all(node is None or node.meta["val"].shape[0] == BATCH for _, node in saved)
    assert {effect_of(node) for node in program.compute_nodes() if node.target in context.OF_RANK} == {Effect.PURE}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_it_does_half_the_work_of_all_pairs(ranks: int) -> None:
    rows, heads = 16, 2
    program, mode = attention_program(ranks, rows, heads, heads, None)
    step(program, mode, {"cp": ranks})
    found = [contraction_flops(node) for node in program.compute_nodes() if node.target in context.OF_RANK]
    pairs = BATCH * heads * rows * ranks * rows
    share = (2 * ranks + 1) / (4 * ranks)
    assert found == [share * 2 * 2 * WIDTH * pairs, share * 2 * 5 * WIDTH * pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_given_back_has_the_dtypes_that_are_planned(dtype: torch.dtype) -> None:
    program, mode = attention_program(2, 4, 4, 2, None, dtype)
    step(program, mode, {"cp": 2})
    inputs = [[torch.randn(node.meta["val"].shape, dtype=dtype) for _ in range(2)] for node in program.placeholders]
    for node, values in zip(program.results, results(program, {"cp": 2}, inputs), strict=True):
        assert node is not None
        planned = node.meta["val"]
        assert {(each.dtype, each.shape) for each in values} == {(planned.dtype, planned.shape)}


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_fused_kernel_it_is_the_same(causal: bool) -> None:
    """Given the result and the sums of more keys, as when these are merged."""
    torch.manual_seed(0)
    query, gradient, result = (torch.randn(2, 4, 6, WIDTH, dtype=torch.float64) for _ in range(3))
    key, value = (torch.randn(2, 2, 6, WIDTH, dtype=torch.float64) for _ in range(2))
    one, other = (each(query, key, value, causal, None) for each in (attention, plain_attention))
    more = one[1] + torch.rand(2, 4, 6, dtype=torch.float64)
    given = gradient, query, key, value, result, more, causal, None
    found = zip([*one, *attention_backward(*given)], [*other, *plain_attention_backward(*given)], strict=True)
    for fused, plain in found:
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)
