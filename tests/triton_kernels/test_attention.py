"""Attention beside a masked softmax in float64; its Triton kernels in the interpreter."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt._torch import TorchDispatchMode
from graphopt.triton_kernels.attention.layouts import bigbird, lists
from graphopt.triton_kernels.attention.op import (
    ATTENTION,
    ATTENTION_BACKWARD,
    SPARSE_ATTENTION,
    SPARSE_ATTENTION_BACKWARD,
    SparseAttention,
    attention,
    choose,
)
from graphopt.triton_kernels.choice import KernelError
from tests.support.attention import assert_together, masked_softmax, projections, read_pairs
from tests.support.kernels import assert_near, computed_by, gradients, in_interpreter, mode
from tests.support.programs import lowered


def _check(function, tensors, read, factor=1.0) -> None:
    doubles = [x.double() for x in tensors]
    seed = torch.randn(tensors[0].shape).to(tensors[0].dtype)
    found = [function(*tensors), *gradients(function, tensors, [seed])]
    wanted = [masked_softmax(*doubles, read), *gradients(lambda *t: masked_softmax(*t, read), doubles, [seed.double()])]
    assert_together(found, wanted, factor)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(0, 9), st.integers(0, 9)),
    width=st.integers(1, 9),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_the_reference_is_a_masked_softmax(sizes, width, causal, window) -> None:
    torch.manual_seed(0)
    batch, key_heads, shared, queries, keys = sizes
    tensors = projections(batch, key_heads * shared, key_heads, queries, keys, width, torch.float64)
    read = read_pairs(queries, keys, causal, window)

    def ours(q, k, v):
        return ATTENTION(q, k, v, None, None, causal, window, 1 / math.sqrt(width))[0]

    with mode("reference"):
        _check(ours, tensors, read)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_packed_sequences_do_not_read_one_another(lengths, causal, window) -> None:
    torch.manual_seed(0)
    starts, key_starts = (
        [sum(pair[side] for pair in lengths[:count]) for count in range(len(lengths) + 1)] for side in (0, 1)
    )
    tensors = projections(1, 2, 1, starts[-1], key_starts[-1], 4, torch.float64)
    read = read_pairs(starts[-1], key_starts[-1], causal, window, starts, key_starts)

    def ours(q, k, v):
        packed = (torch.tensor(starts), torch.tensor(key_starts, dtype=torch.int64))
        return ATTENTION(q, k, v, *packed, causal, window, 1 / math.sqrt(4))[0]

    with mode("reference"):
        _check(ours, tensors, read)


@pytest.mark.parametrize(("causal", "window"), [(True, 140), (True, 7), (False, 20), (False, None)])
def test_the_reference_goes_part_by_part(causal, window) -> None:
    tensors = projections(1, 4, 2, 300, 333, 8, torch.float64)
    with mode("reference"):
        _check(
            lambda q, k, v: ATTENTION(q, k, v, None, None, causal, window, 1 / math.sqrt(8))[0],
            tensors,
            read_pairs(300, 333, causal, window),
            10,
        )


KERNEL_CASES: dict[str, dict[str, Any]] = {
    "all": {"queries": 70, "keys": 50},
    "causal, as many": {"queries": 100, "keys": 100, "causal": True},
    "causal, more keys": {"queries": 20, "keys": 150, "causal": True},
    "causal, more queries": {"queries": 150, "keys": 20, "causal": True},
    "causal window": {"queries": 200, "keys": 200, "causal": True, "window": 30},
    "window": {"queries": 60, "keys": 190, "window": 20},
    "packed": {"queries": 160, "keys": 160, "causal": True, "starts": [0, 3, 3, 140, 160]},
    "packed, other keys": {"queries": 90, "keys": 80, "window": 9, "starts": [0, 40, 90], "key_starts": [0, 70, 80]},
}


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernel_is_a_masked_softmax(name) -> None:
    """Heads that share keys; rows that are not side by side; tiles that are read whole, in part, and not at all."""
    case = dict(KERNEL_CASES[name])
    read = read_pairs(**case)
    tensors = projections(1, 2, 1, case.pop("queries"), case.pop("keys"), 20)
    options = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in case.items()}
    with in_interpreter():
        _check(lambda q, k, v: attention(q, k, v, **options), tensors, read, 10)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.bfloat16, 16), (torch.float16, 64), (torch.bfloat16, 80), (torch.bfloat16, 256), (torch.float32, 128)],
    ids=str,
)
def test_the_kernel_takes_any_width(dtype, width) -> None:
    tensors = projections(2, 2, 2, 40, 70, width, dtype)
    with in_interpreter():
        _check(lambda q, k, v: attention(q, k, v, causal=True, window=33), tensors, read_pairs(40, 70, True, 33), 10)


@pytest.mark.parametrize("way", ["reference", "triton"])
def test_no_query_and_no_key(way) -> None:
    with computed_by(way):
        for queries, keys in ((0, 3), (3, 0), (0, 0)):
            tensors = [x.requires_grad_() for x in projections(1, 2, 1, queries, keys, 16)]
            out = attention(*tensors, window=2)
            assert torch.equal(out, torch.zeros(1, 2, queries, 16))
            assert [x.shape for x in torch.autograd.grad(out.sum(), tensors)] == [x.shape for x in tensors]


@pytest.mark.parametrize("way", ["reference", "triton"])
def test_scores_that_are_large_do_not_overflow(way) -> None:
    tensors = [10 * x for x in projections(1, 1, 1, 40, 40, 16)]
    with computed_by(way):
        _check(lambda q, k, v: attention(q, k, v, window=9), tensors, read_pairs(40, 40, window=9), 1000)


@pytest.mark.parametrize("way", ["reference", "triton"])
def test_a_query_that_is_not_finite_is_the_only_one(way) -> None:
    q, k, v = projections(1, 1, 1, 40, 40, 16)
    q[0, 0, 3, 5] = torch.nan
    q[0, 0, 7] = torch.inf
    with computed_by(way):
        out = attention(q, k, v, causal=True, window=9)
    assert out.isnan().all(-1).squeeze().nonzero().flatten().tolist() == [3, 7]
    assert out[:, :, 8:].isfinite().all()


def test_torchs_own_is_taken_where_all_isread_pairs(monkeypatch) -> None:
    q, k, v = projections(1, 4, 2, 5, 5, 16)
    with mode("auto"):
        assert choose(q, k, True, None, None).variant == choose(q, k[:, :, :3], False, None, None).variant == "torch"
        assert choose(q, k[:, :, :3], True, None, None).variant == choose(q, k, True, 3, None).variant == "reference"
        assert_near([attention(q, k, v, causal=True)], [masked_softmax(q, k, v, read_pairs(5, 5, True))])
    with mode("triton"), pytest.raises(KernelError, match="on cpu, without Triton's interpreter"):
        attention(q, k, v, causal=True)
    with in_interpreter():
        assert choose(q, k, True, None, None).variant == "triton"


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("sparse", [False, True])
def test_the_reference_holds_what_a_part_reads(sparse) -> None:
    """Memory grows with the sequence, not with its square."""
    count, width = 4096, 4
    tensors = [x.requires_grad_() for x in projections(1, 1, 1, count, count, width)]
    with mode("reference"), _Largest() as largest:
        if sparse:
            layout = torch.eye(count // 64, dtype=torch.bool)[None]
            SparseAttention(layout, 64)(*tensors).sum().backward()
        else:
            attention(*tensors, window=64, causal=True).sum().backward()
    assert largest.elements <= max(128 * (128 + 64), count * width)


def test_operators_are_what_they_declare() -> None:
    q, k, v = (x.requires_grad_() for x in projections(1, 4, 2, 20, 20, 4, torch.float64))
    starts = torch.tensor([0, 5, 20], dtype=torch.int32)
    layout = bigbird(2, 1, heads=4)
    for forward, backward, rest in (
        (ATTENTION, ATTENTION_BACKWARD, (None, None, True, 3, 0.3)),
        (ATTENTION, ATTENTION_BACKWARD, (starts, starts, False, None, 0.3)),
        (SPARSE_ATTENTION, SPARSE_ATTENTION_BACKWARD, (*lists(layout), *lists(layout.mT), 16, True, 0.3)),
    ):
        torch.library.opcheck(forward, (q, k, v, *rest))
        assert torch.autograd.gradcheck(lambda *t, f=forward, r=rest: f(*t, *r)[0], (q, k, v), fast_mode=True)
        with torch.no_grad():
            out, lse = forward(q, k, v, *rest)
            checks = ("test_schema", "test_faketensor")  # what is no derivative is not traced by autograd
            torch.library.opcheck(backward, (torch.randn_like(out), q, k, v, out, lse, *rest), test_utils=checks)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(16, 48)
        self.blocks = SparseAttention(bigbird(3, 1, heads=2, causal=True), 16, causal=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.projections(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, causal=True, window=5) + self.blocks(q, k, v)
        return x + out.transpose(1, 2).flatten(2)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_operators_are_one_node_a_layer_each_way() -> None:
    _, program = lowered("zero=3", 2, _Model(), x=torch.randn(2, 40, 16))
    names = [str(node.target) for node in program.graph.nodes if "attention" in str(node.target)]
    operators = (ATTENTION, ATTENTION_BACKWARD, SPARSE_ATTENTION, SPARSE_ATTENTION_BACKWARD)
    assert sorted(names) == sorted(2 * [str(operator) for operator in operators])


@pytest.mark.parametrize("plan", ["zero=0", "remat=full"])
def test_a_compiled_model_computes_what_eager_does(plan) -> None:
    model = _Model()
    compiled = graphopt.compile(copy.deepcopy(model), plan)
    x = torch.randn(2, 40, 16)
    found, wanted = compiled(x), model(x)
    found.backward()
    wanted.backward()
    assert torch.equal(found, wanted)
    for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: attention(q[0], k, k, window=2), r"q is float32 \[4, 5, 8\].*at least 4 dimensions"),
        (lambda q, k: attention(q, k[..., :4], k, window=2), r"k is float32 \[1, 2, 5, 4\].*which differs from q"),
        (lambda q, k: attention(q[:, :3], k, k, window=2), "k has 2 heads, which do not divide the 3 of q"),
        (lambda q, k: attention(q, k, k.double(), window=2), r"v is float64 \[1, 2, 5, 8\].*as k"),
        (lambda q, k: attention(q, k, k, window=0), "window is 0, not at least 1"),
        (lambda q, k: attention(q, k, k, window=2, scale=-1.0), "scale is -1.0, not positive and finite"),
        (lambda q, k: attention(q, k, k, starts=torch.tensor([0, 4])), r"starts is \[0, 4\].*from 0 to 5, as q has"),
        (lambda q, k: attention(q, k, k, starts=torch.tensor([0.0, 5.0])), r"starts is float32 \[2\].*int32 or int64"),
        (lambda q, k: attention(q, k, k, key_starts=torch.tensor([0, 5]), window=1), "starts is None.*give both"),
        (
            lambda q, k: attention(
                q, k, k, starts=torch.tensor([0, 5]), key_starts=torch.tensor([0, 2, 5])
            ),
            r"key_starts is int64 \[3\]",
        ),
        (
            lambda q, k: attention(q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1),
                                   starts=torch.tensor([0, 5])),
            r"q is float32 \[2, 4, 5, 8\].*a batch of one",
        ),
        (lambda q, k: SparseAttention(torch.ones(2, 2), 16), r"layout is torch.float32 \[2, 2\]"),
        (lambda q, k: SparseAttention(torch.ones(1, 1, 1) > 0, 24)(q, k, k), "block is 24, not a power of two from 16"),
        (
            lambda q, k: SparseAttention(torch.ones(1, 2, 2) > 0, 16)(q, k, k),
            r"row_offsets is int32 \[1, 3\].*not \[1 or 4, 2\].*of 1 x 1 blocks of 16",
        ),
        (
            lambda q, k: ATTENTION_BACKWARD(q, q, k, k, q, q[0], None, None, True, 1, 1.0),
            r"lse is float32 \[4, 5, 8\]",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8))
