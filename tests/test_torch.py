"""Each private name of torch that is used still does what it is used for."""

import copy
import functools
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from graphopt import _torch
from tests.support.functions import Doubled, doubled


def test_fake_tensors_have_shapes_and_no_bytes() -> None:
    mode = _torch.new_fake_mode()
    with mode:
        value = torch.empty(1 << 40, 1 << 10)
    assert value.shape == (1 << 40, 1 << 10)


def test_tracing_records_autograd() -> None:
    mode = _torch.new_fake_mode()
    with mode:
        value = torch.empty(3, requires_grad=True)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        assert len(list(_torch.traced_graph().nodes)) >= 1
        return torch.autograd.grad(torch.sin(x).sum(), x)[0]

    module = _torch.trace(gradient, [value], mode)
    assert torch.ops.aten.cos.default in {node.target for node in module.graph.nodes}


def test_sequence_numbers_count_autograd_nodes() -> None:
    x = torch.ones(2, requires_grad=True)
    before = _torch.sequence_number()
    y = torch.sin(x)
    assert y.grad_fn is not None and y.grad_fn._sequence_nr() == before  # type: ignore[attr-defined]
    assert _torch.sequence_number() == before + 1


def test_reparametrization_lasts_for_the_context() -> None:
    module = nn.Linear(2, 2, bias=False)
    held = module.weight
    with _torch.reparametrized(module, {"weight": torch.zeros(2, 2)}):
        assert torch.equal(module(torch.ones(2)), torch.zeros(2))
    assert module.weight is held


def test_reparametrization_puts_back_what_a_module_in_two_places_held() -> None:
    layer = nn.Linear(2, 2, bias=False)
    module, held = nn.Sequential(layer, layer), layer.weight
    zeros = torch.zeros(2, 2)
    with _torch.reparametrized(module, {"0.weight": zeros, "1.weight": zeros}):
        assert layer.weight is zeros
    assert layer.weight is held


def test_a_compiled_call_is_what_runs_and_is_not_copied() -> None:
    module = nn.Linear(2, 2)
    _torch.install_compiled_call(module, lambda x: "ran")
    assert module(torch.ones(2)) == "ran" and _torch.compiled_call(module) is not None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert _torch.compiled_call(twin) is None
    _torch.install_compiled_call(module, None)
    assert module(torch.ones(2)).shape == (2,)


def test_versions_count_changes_in_place() -> None:
    value = torch.zeros(2)
    before = _torch.version_of(value)
    value.add_(1)
    assert _torch.version_of(value) == before + 1
    assert _torch.version_of(_torch.local_tensor(value)) == before + 1


def test_a_distributed_tensor_lies_as_another_in_place() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        kept = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Replicate()]))
        other = DTensor.from_local(torch.zeros(4), mesh, [Shard(0)])
        _torch.redistribute_in_place(kept, other)  # type: ignore[arg-type]
        assert kept.placements == (Shard(0),) and kept.requires_grad  # type: ignore[attr-defined]
        assert _torch.local_tensor(kept) is _torch.local_tensor(other)
    finally:
        dist.destroy_process_group()


def test_a_backward_pass_knows_whether_it_keeps_the_graph() -> None:
    kept = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            kept.append(_torch.keeps_graph())
            return gradient

    y = Asks.apply(torch.ones(2, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert kept == [True, False]


def test_what_operators_do_besides_computing() -> None:
    aten = torch.ops.aten
    assert _torch.is_mutating(aten.add_.Tensor) and not _torch.is_mutating(aten.add.Tensor)
    assert _torch.aliases_argument(aten.view.default) and not _torch.aliases_argument(aten.add.Tensor)
    assert _torch.returns_nothing(aten._assert_scalar.default)


def test_every_batch_norm_is_one() -> None:
    assert all(isinstance(kind(2), _torch.BatchNorm) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
    assert not isinstance(nn.LayerNorm(2), _torch.BatchNorm)


def test_a_mode_sees_every_operation() -> None:
    seen = []

    class Sees(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Sees():
        torch.ones(2).neg()
    assert torch.ops.aten.neg.default in seen


def test_what_is_asked_of_symbols_without_guards_binds_none() -> None:
    mode = _torch.new_fake_mode()
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    value = mode.from_tensor(torch.empty(6), symbolic_context=context)
    with _torch.without_guards(mode):
        assert value.shape[0] == 6
    assert not mode.shape_env.guards and isinstance(value.shape[0], torch.SymInt)


def _symbolic(mode: Any) -> torch.SymInt:
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    size = mode.from_tensor(torch.empty(6), symbolic_context=context).shape[0]
    assert isinstance(size, torch.SymInt)
    return size


def test_symbolic_sizes_say_what_they_are_made_of() -> None:
    size = _symbolic(_torch.new_fake_mode())
    expression = _torch.symbolic_expression(size * 4 + 1)
    (symbol,) = expression.free_symbols
    assert expression == 4 * symbol + 1
    assert _torch.symbol_example(size, symbol) == 6
    assert _torch.symbol_range(size, symbol) == (2, None)
    with pytest.raises(KeyError):
        _torch.symbol_example(size, sympy.Symbol("u0"))


def test_symbols_can_be_declared_in_another_mode() -> None:
    mode = _torch.new_fake_mode()
    symbol = sympy.Symbol("s7", integer=True, positive=True)
    for _ in range(2):  # a symbol that is known is left as it is
        _torch.declare_symbol(mode, symbol, 6, (2, 100))
    size = _torch.symbolic_size(mode, 4 * symbol)
    assert isinstance(size, torch.SymInt) and str(size) == "4*s7" and size.node.hint == 24
    assert _torch.symbol_range(size, symbol) == (2, 100)
    bound = _torch.symbolic_size(mode, sympy.Integer(3))
    assert isinstance(bound, torch.SymInt) and bound == 3


def test_functions_of_expressions_are_found_by_name() -> None:
    assert _torch.symbolic_function("FloorDiv")(sympy.Integer(7), sympy.Integer(2)) == 3
    assert _torch.symbolic_function("Mul") is sympy.Mul
    with pytest.raises(AttributeError):
        _torch.symbolic_function("no_such_function")


def test_an_argument_is_found_by_name_place_or_default() -> None:
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert _torch.argument(attention, "dropout_p", (1, 2, 3, None, 0.5), {}) == 0.5
    assert _torch.argument(attention, "dropout_p", (1, 2, 3), {"dropout_p": 0.25}) == 0.25
    assert _torch.argument(attention, "dropout_p", (1, 2, 3), {}) == 0.0
    assert _torch.argument(torch.ops.aten.add.Tensor, "dropout_p", (), {}) is None


def test_code_of_a_lazy_module_is_made_when_it_is_called() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.sin, (graph.placeholder("x"),)))
    module = _torch.lazy_graph_module(nn.Module(), graph)
    assert isinstance(module, torch.fx.GraphModule) and "_code" not in vars(module)
    assert torch.equal(module(torch.ones(2)), torch.ones(2).sin())
    assert "sin" in module.code


def test_declared_arguments_tell_tensors_from_others() -> None:
    assert _torch.declared_arguments(torch.ops.aten.cat.default) == {"tensors": True, "dim": False}
    declared = _torch.declared_arguments(torch.ops.aten.linear.default)
    assert list(declared.items()) == [("input", True), ("weight", True), ("bias", True)]


def test_the_switch_of_gradients_is_seen_unless_nothing_is() -> None:
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        assert seen == [_torch.set_grad_enabled]
        with _torch.without_torch_function(), torch.enable_grad():
            assert seen == [_torch.set_grad_enabled] and torch.is_grad_enabled()


def test_a_backend_of_halves_gets_forward_and_backward() -> None:
    halves = []

    def compile_half(module: fx.GraphModule) -> Callable[[list[Any]], Any]:
        halves.append(module)
        return fx.Interpreter(module).boxed_run

    def saved(share: float) -> int:
        """Elements that forward saves."""
        torch.compiler.reset()
        halves.clear()
        x, weight = torch.ones(4, 64, requires_grad=True), torch.full((64, 64), 1 / 64, requires_grad=True)
        with _torch.activation_memory_budget(share):
            function = torch.compile(_two_products, backend=_torch.backend_of_halves(compile_half))
            function(x, weight).backward()
        assert x.grad is not None
        wanted = torch.autograd.grad(_two_products(x, weight), x)
        torch.testing.assert_close((x.grad,), wanted)
        forward, _ = halves
        return sum(node.meta["val"].numel() for node in forward.graph.find_nodes(op="output")[0].all_input_nodes)

    assert saved(0) < saved(1)


def test_the_default_store_is_that_of_the_process_group() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _torch.default_store().set("key", "value")
        assert _torch.default_store().get("key") == b"value" and store.num_keys() > 0
    finally:
        dist.destroy_process_group()


def test_a_fresh_cache_of_inductor_is_gone_afterwards() -> None:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with _torch.fresh_inductor_cache():
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert folder != before and os.path.isdir(folder)
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before and not os.path.exists(folder)


def _two_products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.sin(torch.sin(x @ weight) @ weight).sum()


def test_functions_of_the_user_s_are_told_from_those_of_torch() -> None:
    @torch.library.custom_op("graphopt_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_autograd(lambda ctx, gradient: gradient * 2)
    x = torch.ones(2, requires_grad=True)
    assert _torch.custom_function(doubled(x)) is Doubled
    assert _torch.custom_function(doubled(x.detach())) is None
    assert _torch.custom_function(twice(x)) is None and twice(x).requires_grad
    assert _torch.custom_function(x * 2) is None and _torch.custom_function(x) is None


def test_hooks_on_saved_tensors_are_out_of_force_for_the_context() -> None:
    packed = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        packed.append(x)
        return x

    def other(x: torch.Tensor) -> torch.Tensor:
        return x

    x = torch.ones(2, requires_grad=True)
    with saved_tensors_hooks(pack, other), saved_tensors_hooks(other, other):
        with _torch.without_saved_tensor_hooks() as hooks, _torch.without_saved_tensor_hooks() as within:
            assert hooks == [pack, other] and within == []
            x.sin()
        with _torch.without_saved_tensor_hooks() as hooks:
            assert hooks == [pack, other]
    with saved_tensors_hooks(pack, other):
        with _torch.without_saved_tensor_hooks():
            x.sin()
        assert not packed
        x.sin()
    assert len(packed) == 1


def test_selective_checkpoints_are_found_with_their_policies() -> None:
    seen = []

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append((operator, len(_torch.selective_checkpoints())))
        return CheckpointPolicy.PREFER_RECOMPUTE

    def inside(x: torch.Tensor) -> torch.Tensor:
        (mode,) = _torch.selective_checkpoints()
        assert mode.policy_fn is policy
        return x.sin()

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpoint(inside, torch.ones(2, requires_grad=True), use_reentrant=False, context_fn=contexts)
    assert seen[0][0] is torch.ops.aten.sin.default and not _torch.selective_checkpoints()


def test_buffers_keep_their_dtype_when_a_module_is_cast() -> None:
    class Counting(_torch.BuffersAsMade):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("sums", torch.full((2,), 0.75))
            self.register_buffer("absent", None)

    model = nn.Sequential(Counting()).bfloat16()
    assert {name: value.dtype for name, value in model.state_dict().items()} == {
        "0.weight": torch.bfloat16,
        "0.sums": torch.float32,
    }
    assert dict(model.named_buffers())["0.sums"].tolist() == [0.75, 0.75]
    assert model.to("meta")[0].sums.is_meta


def test_products_of_int8_are_exact() -> None:
    x, weight = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, 40), (5, 40)))
    assert torch.equal(_torch.int_mm(x, weight.t()), x.int() @ weight.t().int())


def test_products_of_float8_have_scales() -> None:
    """Numbers that float8 holds, so that nothing is rounded."""
    x, weight = (torch.randint(-4, 5, shape).to(torch.float8_e4m3fn) for shape in ((16, 32), (16, 32)))
    scales = torch.tensor(2.0), torch.tensor(0.25)
    found = _torch.scaled_product(x, weight.t(), *scales, None, torch.float32)
    assert torch.equal(found, 0.5 * x.float() @ weight.float().t())
