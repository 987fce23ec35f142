"""Calls of operators of every family with drawn shapes, for tests of their signatures."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from graphopt.triton_kernels.experts.products.op import GROUPED_MM

aten = torch.ops.aten
Call = tuple[Any, ...]  # an operator and its arguments, of which the last may be named ones
Draw = Callable[[st.SearchStrategy[Any]], Any]
sizes = st.integers(1, 6)
flags = st.booleans()


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def indices(limit: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, limit, shape)


def shapes(least: int = 1, most: int = 4) -> st.SearchStrategy[list[int]]:
    return st.lists(sizes, min_size=least, max_size=most)


def _dim(draw: Draw, shape: list[int]) -> int:
    return draw(st.integers(-len(shape), len(shape) - 1))


def _broadcast(draw: Draw, shape: list[int]) -> torch.Tensor:
    """A tensor that is broadcast to `shape`."""
    ones = [1 if draw(flags) else size for size in shape]
    return real(*ones[draw(st.integers(0, len(shape))) :])


def arithmetic(draw: Draw) -> Call:
    shape = draw(shapes())
    pair = draw(st.permutations([real(*shape), _broadcast(draw, shape)]))
    return (draw(st.sampled_from([aten.add, aten.sub, aten.mul, aten.div, aten.le, aten.ge])).Tensor, *pair)


def with_number(draw: Draw) -> Call:
    operators = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar]
    return draw(st.sampled_from(operators)), real(*draw(shapes())), 2


def unary(draw: Draw) -> Call:
    packets = [aten.exp, aten.neg, aten.gelu, aten.silu, aten.clone, aten.detach, aten.zeros_like, aten._to_copy]
    return draw(st.sampled_from(packets)).default, real(*draw(shapes()))


def rounded(draw: Draw) -> Call:
    shape = draw(shapes())
    mode = {"rounding_mode": draw(st.sampled_from(["floor", "trunc", None]))}
    return aten.div.Tensor_mode, real(*shape), _broadcast(draw, shape), mode


def where(draw: Draw) -> Call:
    shape = draw(shapes())
    return aten.where.self, _broadcast(draw, shape) > 0, _broadcast(draw, shape), real(*shape)


def masked_fill(draw: Draw) -> Call:
    shape = draw(shapes())
    return aten.masked_fill.Scalar, real(*shape), _broadcast(draw, shape) > 0, draw(st.sampled_from([0, 1]))


def type_as(draw: Draw) -> Call:
    shape = draw(shapes())
    return aten.type_as.default, real(*shape), draw(st.sampled_from([real(*shape), real(3)]))


def triangle(draw: Draw) -> Call:
    return draw(st.sampled_from([aten.tril, aten.triu])).default, real(*draw(shapes(2))), draw(st.integers(-2, 2))


def created(draw: Draw) -> Call:
    shape = draw(shapes())
    made: list[Call] = [
        (aten.zeros.default, shape),
        (aten.full.default, shape, 3),
        (aten.arange.default, shape[0]),
        (aten.new_ones.default, real(*draw(shapes())), shape),
        (aten.new_full.default, real(*shape), shape, 2),
    ]
    return draw(st.sampled_from(made))


@st.composite
def _grouped(draw: Draw, factors: list[int]) -> list[int]:
    """Factors multiplied to fewer sizes, with ones in between."""
    shape: list[int] = []
    for factor in factors:
        kind = draw(st.integers(0, 3))
        if shape and kind < 2:
            shape[-1] *= factor
        else:
            shape += [1, factor] if kind == 2 else [factor]
    return shape


def reshape(draw: Draw) -> Call:
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    before, after = draw(_grouped(factors)), draw(_grouped(draw(st.permutations(factors)) if draw(flags) else factors))
    at = draw(st.integers(0, len(after) - 1))
    asked = [-1 if place == at and draw(flags) else size for place, size in enumerate(after)]
    return aten.reshape.default, real(*before), asked


def unflatten(draw: Draw) -> Call:
    shape = draw(shapes())
    at, more = draw(st.integers(0, len(shape) - 1)), draw(sizes)
    shape[at] *= more
    return aten.unflatten.int, real(*shape), at, [shape[at] // more, more]


def permute(draw: Draw) -> Call:
    shape = draw(shapes())
    return aten.permute.default, real(*shape), draw(st.permutations(range(len(shape))))


def transpose(draw: Draw) -> Call:
    shape = draw(shapes())
    return aten.transpose.int, real(*shape), _dim(draw, shape), _dim(draw, shape)


def movedim(draw: Draw) -> Call:
    shape = draw(shapes())
    return aten.movedim.int, real(*shape), _dim(draw, shape), _dim(draw, shape)


def expand(draw: Draw) -> Call:
    shape = draw(shapes())
    operand = _broadcast(draw, shape)
    kept = len(shape) - operand.dim()
    return aten.expand.default, operand, [size if at < kept or draw(flags) else _kept(operand, at - kept, size)
                                          for at, size in enumerate(shape)]  # fmt: skip


def _kept(operand: torch.Tensor, at: int, size: int) -> int:
    return -1 if operand.shape[at] == size else size


def broadcast_tensors(draw: Draw) -> Call:
    shape = draw(shapes())
    return aten.broadcast_tensors.default, [real(*shape), _broadcast(draw, shape)]


def squeeze(draw: Draw) -> Call:
    shape = draw(shapes())
    made: list[Call] = [
        (aten.squeeze.dim, real(*shape), _dim(draw, shape)),
        (aten.squeeze.default, real(*shape)),
        (aten.unsqueeze.default, real(*shape), _dim(draw, shape)),
    ]
    return draw(st.sampled_from(made))


def taken(draw: Draw) -> Call:
    shape = draw(shapes())
    at = _dim(draw, shape)
    start = draw(st.integers(0, shape[at] - 1))
    made: list[Call] = [
        (aten.select.int, real(*shape), at, start),
        (aten.slice.Tensor, real(*shape), at, start, draw(st.sampled_from([shape[at], 2**63 - 1, -1]))),
        (aten.narrow.default, real(*shape), at, start, draw(st.integers(0, shape[at] - start))),
        (aten.unbind.int, real(*shape), at),
    ]
    return draw(st.sampled_from(made))


def split(draw: Draw) -> Call:
    shape = draw(shapes())
    at, count = _dim(draw, shape), draw(st.integers(1, 3))
    piece = shape[at]
    shape[at] *= count
    rest = shape[at] - piece
    made: list[Call] = [
        (aten.split.Tensor, real(*shape), draw(st.sampled_from([piece, max(1, piece - 1)])), at),
        (aten.split_with_sizes.default, real(*shape), [piece, rest], at),
        (aten.split_with_sizes.default, real(*shape), [piece] * count, at),
        (aten.chunk.default, real(*shape), count, at),
        (aten.glu.default, torch.cat([real(*shape)] * 2, at), at),
    ]
    return draw(st.sampled_from(made))


def joined(draw: Draw) -> Call:
    shape = draw(shapes())
    at, count = _dim(draw, shape), draw(st.integers(1, 3))
    others = [[draw(sizes) if place == at % len(shape) else size for place, size in enumerate(shape)]] * draw(sizes)
    made: list[Call] = [
        (aten.cat.default, [real(*shape) for _ in range(count)], at),
        (aten.cat.default, [real(*each) for each in (shape, *others)], at),
        (aten.stack.default, [real(*shape) for _ in range(count)], at),
    ]
    return draw(st.sampled_from(made))


def repeated(draw: Draw) -> Call:
    shape = draw(shapes())
    times = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape) + 1))
    at = draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    size = None if at is None or draw(flags) else shape[at] * times[0]
    made: list[Call] = [
        (aten.repeat.default, real(*shape), times),
        (aten.repeat_interleave.self_int, real(*shape), times[0], at, {"output_size": size}),
    ]
    return draw(st.sampled_from(made))


def moved(draw: Draw) -> Call:
    shape = draw(shapes())
    at = _dim(draw, shape)
    first = real(*shape).narrow(at, 0, 1)
    made: list[Call] = [
        (aten.roll.default, real(*shape), [1], [at]),
        (aten.flip.default, real(*shape), [at]),
        (aten.cumsum.default, real(*shape), at),
        (aten.diff.default, real(*shape), 1, at),
        (aten.diff.default, real(*shape), 1, at, first),
        (aten.constant_pad_nd.default, real(*shape), [draw(sizes), -1], draw(st.sampled_from([0, 1]))),
        (aten.pad.default, real(*shape), [1, 1], "constant", draw(st.sampled_from([None, 0.0, 1.0]))),
    ]
    return draw(st.sampled_from(made))


def put(draw: Draw) -> Call:
    shape = draw(shapes())
    at = _dim(draw, shape) % len(shape)
    start = draw(st.integers(0, shape[at] - 1))
    piece = [*shape[:at], shape[at] - start, *shape[at + 1 :]]
    made: list[Call] = [
        (aten.slice_scatter.default, real(*shape), real(*piece), at, start),
        (aten.select_scatter.default, real(*shape), real(*shape[:at], *shape[at + 1 :]), at, start),
    ]
    return draw(st.sampled_from(made))


def product(draw: Draw) -> Call:
    b, m, k, n = (draw(sizes) for _ in range(4))
    batch, other = draw(shapes(0, 2)), draw(st.sampled_from([[], [b], [1]]))
    batch = batch[: len(batch) - 1] + other if batch else other
    made: list[Call] = [
        (aten.linear.default, real(*batch, k), real(n, k), draw(st.sampled_from([None, real(n)]))),
        (aten.linear.default, real(*batch, k), real(k)),
        (aten.mm.default, real(m, k), real(k, n)),
        (aten.bmm.default, real(b, m, k), real(b, k, n)),
        (aten.addmm.default, draw(st.sampled_from([real(n), real(m, n), real(1, n)])), real(m, k), real(k, n)),
        (aten.baddbmm.default, draw(st.sampled_from([real(1, m, n), real(b, 1, n)])), real(b, m, k), real(b, k, n)),
        (aten.matmul.default, real(*batch, m, k), draw(st.sampled_from([real(k), real(k, n), real(*other, k, n)]))),
        (aten.matmul.default, real(k), real(b, k, n)),
        (aten.mv.default, real(m, k), real(k)),
        (aten.dot.default, real(k), real(k)),
        (aten.einsum.default, "bmk,bkn->bnm", [real(b, m, k), real(b, k, n)]),
        (aten.einsum.default, "mk,kn", [real(m, k), real(k, n)]),
        (GROUPED_MM, real(m, k), real(b, k, n), indices(m + 1, b).sort().values.int()),
    ]
    return draw(st.sampled_from(made))


def reduced(draw: Draw) -> Call:
    shape = draw(shapes())
    dims, keep = draw(st.lists(st.integers(0, len(shape) - 1), max_size=2, unique=True)), draw(flags)
    x, at = real(*shape), _dim(draw, shape)
    made: list[Call] = [
        (aten.sum.dim_IntList, x, dims, keep),
        (aten.mean.dim, x, dims, keep),
        (aten.amax.default, x, dims, keep),
        (aten.logsumexp.default, x, dims or [0], keep),
        (aten.linalg_vector_norm.default, x, 2, dims or None, keep),
        (aten.var.correction, x, dims or None, {"correction": 0, "keepdim": keep}),
        (aten.max.dim, x, at, keep),
        (aten.argmax.default, x, draw(st.sampled_from([None, at])), keep),
        (aten.any.dim, x > 0, at, keep),
        (aten.sum.default, x),
        (aten.max.default, x),
        (aten.max.other, x, real(*shape)),
        (aten.topk.default, x, draw(st.integers(1, shape[at])), at),
        (aten.sort.default, x, at),
    ]
    return draw(st.sampled_from(made))


def loss(draw: Draw) -> Call:
    shape = draw(shapes())
    packets = [aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.binary_cross_entropy_with_logits]
    reduction = {"reduction": draw(st.integers(0, 2))}
    return draw(st.sampled_from(packets)).default, real(*shape), real(*shape).sigmoid(), reduction


def normalized(draw: Draw) -> Call:
    shape = draw(shapes(2))
    n, c = shape[:2]
    last, x = shape[-draw(st.integers(1, len(shape))) :], real(*shape)
    running = [real(c), real(c).abs(), False, 0.1, 1e-5]
    training = [real(c), real(c).abs(), True, 0.1, 1e-5]
    made: list[Call] = [
        (aten.layer_norm.default, x, last, draw(st.sampled_from([None, real(*last)])), real(*last)),
        (aten.native_layer_norm.default, x, last, real(*last), None, 1e-5),
        (aten.rms_norm.default, x, last, real(*last)),
        (aten.group_norm.default, x, draw(st.sampled_from([1, c])), real(c), real(c)),
        (aten.prelu.default, x, real(c)),
        (aten.softmax.int, x, _dim(draw, shape)),
        (aten.log_softmax.int, x, _dim(draw, shape)),
        (aten._native_batch_norm_legit_functional.default, x, real(c), real(c), *running),
    ]
    if n > 1:
        made.append((aten._native_batch_norm_legit_functional.default, x, real(c), real(c), *training))
    return draw(st.sampled_from(made))


def attention(draw: Draw) -> Call:
    b, g, r, s, t, d, e = (draw(sizes) for _ in range(7))
    heads, causal = g * r, draw(flags)
    mask = None if causal else draw(st.sampled_from([None, real(s, t), real(b, 1, s, t), real(b, heads, 1, t)]))
    named = {"attn_mask": mask, "is_causal": causal}
    few = draw(st.sampled_from([heads, 1, g]))
    grouped = {**named, "enable_gqa": True} if few not in (heads, 1) or draw(flags) else named
    query, key, value = real(b, heads, s, d), real(b, few, t, d), real(b, few, t, e)
    return aten.scaled_dot_product_attention.default, query, key, value, grouped


def looked_up(draw: Draw) -> Call:
    shape, few = draw(shapes()), draw(shapes(1, 3))
    at = _dim(draw, shape) % len(shape)
    size = shape[at]
    chosen = [*shape[:at], few[0], *shape[at + 1 :]]
    fewer = [draw(st.integers(1, each)) for each in shape]
    x, i = real(*shape), indices(size, few[0])
    every = torch.arange(size).expand(*shape[:at], *shape[at + 1 :], size).movedim(-1, at)
    made: list[Call] = [
        (aten.embedding.default, real(few[0], shape[0]), indices(few[0], *few)),
        (aten.index_select.default, x, at, i),
        (aten.gather.default, x, at, indices(size, *chosen)),
        (aten.gather.default, x, at, indices(size, *fewer)),
        (aten.scatter.src, x, at, every, x + 1),
        (aten.scatter_add.default, x, at, indices(size, *fewer), real(*shape)),
        (aten.index_add.default, x, at, i, real(*chosen)),
        (aten.index.Tensor, x, [*[None] * at, indices(size, *few)]),
        (aten.index_put.default, x, [*[None] * at, indices(size, 1)], real(*shape[:at], 1, *shape[at + 1 :])),
        (aten.one_hot.default, indices(4, *few), 4),
        (aten.isin.Tensor_Tensor, indices(4, *few), indices(4, size)),
        (aten.bucketize.Tensor, x, real(size).sort().values),
        (aten.searchsorted.Tensor, real(size).sort().values, x),
    ]
    return draw(st.sampled_from(made))


def indexed_twice(draw: Draw) -> Call:
    a, b, c, n = (draw(sizes) for _ in range(4))
    one, other = indices(a, n, 1), indices(c, draw(sizes))
    return aten.index.Tensor, real(a, b, c), draw(st.sampled_from([[one, None, other], [one % b, other % b]]))


def class_loss(draw: Draw) -> Call:
    n, c = draw(sizes), draw(sizes)
    space = draw(shapes(0, 2))
    logits, target = real(n, c, *space), indices(c, n, *space)
    weight = draw(st.sampled_from([None, real(c).abs()]))
    reduction = draw(st.integers(0, 2))
    made: list[Call] = [
        (aten.cross_entropy_loss.default, logits, target, weight, reduction, 0, draw(st.sampled_from([0.0, 0.1]))),
        (aten.cross_entropy_loss.default, logits, logits.softmax(1), weight, reduction),
        (aten.cross_entropy_loss.default, logits[0], target[0], None, reduction)
        if not space
        else (aten.nll_loss_nd.default, logits, target, weight, reduction),
    ]
    return draw(st.sampled_from(made))


def convolution(draw: Draw) -> Call:
    n, g, i, o, size, kernel = (draw(sizes) for _ in range(6))
    rank, bias = draw(st.integers(1, 2)), draw(flags)
    space, window = [max(size, kernel)] * rank, [kernel] * rank
    images, weight = real(n, g * i, *space), real(g * o, i, *window)
    given = [real(g * o) if bias else None, [1] * rank, [0] * rank]
    forward = {1: aten.conv1d, 2: aten.conv2d}[rank].default
    backward = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input}[rank]
    made: list[Call] = [
        (forward, images, weight, *given, [1] * rank, g),
        (forward, images[0], weight, *given, [1] * rank, g),
        (aten.convolution.default, images, weight, *given, [1] * rank, False, [0] * rank, g),
        (backward, images, real(g * i, o, *window), *given, [0] * rank, g),
    ]
    return draw(st.sampled_from(made))


def pooled(draw: Draw) -> Call:
    n, c, size = draw(sizes), draw(sizes), draw(st.integers(2, 6))
    images = draw(st.sampled_from([real(n, c, size, size), real(c, size, size)]))
    packets = [aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d]
    return draw(st.sampled_from(packets)).default, images, [2, 2]


FAMILIES = (
    arithmetic, with_number, unary, rounded, where, masked_fill, type_as, triangle, created, reshape, unflatten,
    permute, transpose, movedim, expand, broadcast_tensors, squeeze, taken, split, joined, repeated, moved, put,
    product, reduced, loss, normalized, attention, looked_up, indexed_twice, class_loss, convolution, pooled,
)  # fmt: skip
