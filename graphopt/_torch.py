"""The only file that touches private torch names: one small function for each, each with a test."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import sympy  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import SequenceKey
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils.checkpoint import _CachingTorchDispatchMode as SelectiveCheckpoint

__all__ = [
    "BatchNorm",
    "BuffersAsMade",
    "FakeTensorMode",
    "OpOverload",
    "SelectiveCheckpoint",
    "SequenceKey",
    "TorchDispatchMode",
    "activation_memory_budget",
    "aliases_argument",
    "all_gather_single",
    "backend_of_halves",
    "compiled_call",
    "custom_function",
    "declare_symbol",
    "declared_arguments",
    "default_store",
    "distributed_tensor",
    "fresh_inductor_cache",
    "inductor_compile",
    "install_compiled_call",
    "int_mm",
    "is_mutating",
    "keeps_graph",
    "kernels_in_python",
    "lazy_graph_module",
    "local_tensor",
    "new_fake_mode",
    "pytree",
    "redistribute_in_place",
    "reduce_scatter_single",
    "reparametrized",
    "returns_nothing",
    "scaled_product",
    "selective_checkpoints",
    "sequence_number",
    "set_grad_enabled",
    "shape_guards",
    "shape_guards_hold",
    "symbol_example",
    "symbol_range",
    "symbolic_expression",
    "symbolic_function",
    "symbolic_size",
    "trace",
    "traced_graph",
    "tracing_with",
    "version_of",
    "without_guards",
    "without_saved_tensor_hooks",
    "without_torch_function",
]

# torch 2.13 renamed the collectives of one tensor; 2.11 knows the old names only.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

set_grad_enabled = torch._C._set_grad_enabled  # what every way to switch autograd on or off comes to
int_mm = torch._int_mm  # int8 [m, k] and [k, n] to int32
without_torch_function = torch._C.DisableTorchFunction  # a context in which no `TorchFunctionMode` sees a call


def new_fake_mode() -> FakeTensorMode:
    """A mode whose tensors have shapes but no bytes, with symbolic sizes allowed."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))


@contextlib.contextmanager
def tracing_with(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Let `torch.export` use `fake_mode` rather than make one of its own."""
    with tracing(TracingContext(fake_mode)):
        yield


def trace(function: Any, arguments: list[Any], fake_mode: FakeTensorMode) -> torch.fx.GraphModule:
    """Record what `function` does to fake `arguments`, autograd included, as one flat graph."""
    sizes = [size for value in arguments if isinstance(value, torch.Tensor) for size in value.shape]
    with (
        fake_mode,
        # Some operators want sizes to be numbers unless they run in Python, where they are decomposed otherwise.
        kernels_in_python() if any(isinstance(size, torch.SymInt) for size in sizes) else contextlib.nullcontext(),
        tracing(TracingContext(fake_mode)),
        torch.autograd.set_multithreading_enabled(False),
    ):
        return make_fx(function, record_stack_traces=False)(*arguments)


def traced_graph() -> Graph:
    """The graph that `trace` is filling at this moment."""
    mode = get_proxy_mode()
    assert mode is not None, "called outside of a trace"
    graph = mode.tracer.graph
    assert isinstance(graph, Graph)
    return graph


def sequence_number() -> int:
    """The number that autograd will give to the next node it makes."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_guards(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Run on fake tensors of `fake_mode` without that what is asked of symbolic sizes binds them."""
    assert fake_mode.shape_env is not None
    with fake_mode.shape_env.suppress_guards():
        yield


def shape_guards(fake_mode: FakeTensorMode, fakes: list[Any]) -> str | None:
    """What tracing assumed of symbolic sizes, as an expression over the arguments; None if nothing."""
    assert fake_mode.shape_env is not None
    return fake_mode.shape_env.produce_guards_expression(fakes)


def shape_guards_hold(fake_mode: FakeTensorMode, guards: str, tensors: list[torch.Tensor]) -> bool:
    """Whether `shape_guards` hold for real arguments."""
    assert fake_mode.shape_env is not None
    return bool(fake_mode.shape_env.evaluate_guards_expression(guards, tensors))


@contextlib.contextmanager
def reparametrized(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Exchange parameters and buffers, by qualified name, for the time of the context.

    Of the names that a module in several places has for one tensor, the first counts: torch would put back the
    exchanged one.
    """
    places: dict[tuple[int, str], str] = {}
    for name in tensors:
        path, _, attribute = name.rpartition(".")
        places.setdefault((id(module.get_submodule(path)), attribute), name)
    with stateless._reparametrize_module(module, {name: tensors[name] for name in places.values()}):
        yield


def scaled_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """float8 x [m, k] @ weight [k, n], the latter by columns, times scales, both [] or [m, 1] and [1, n], plus bias."""
    return torch._scaled_mm(x, weight, scale_a=x_scale, scale_b=weight_scale, bias=bias, out_dtype=dtype)


def install_compiled_call(module: nn.Module, call: Any) -> None:
    """Have `module(...)` run `call`: the slot that `nn.Module.compile` uses, dropped by pickling and deepcopy."""
    module._compiled_call_impl = call


def compiled_call(module: nn.Module) -> Any:
    """What `install_compiled_call` put there, or None."""
    return module._compiled_call_impl


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, without autograd and without dispatch; a plain tensor itself, detached."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def distributed_tensor(local: torch.Tensor, like: DTensor) -> DTensor:
    """A DTensor with the global shape and placement of `like` over another local tensor; no dispatch."""
    return DTensor(local, like._spec, requires_grad=False)


def redistribute_in_place(tensor: DTensor, value: DTensor) -> None:
    """Have `tensor` lie over the ranks as `value` of the same global shape does, over its bytes; the object stays."""
    tensor._local_tensor, tensor._spec = value._local_tensor, value._spec


def mesh_of_others(device_type: str, ranks: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of ranks of which this is none: it says where something lies, and has no process groups."""
    return DeviceMesh(device_type, ranks, mesh_dim_names=names, _init_backend=False)


def forget_shardings() -> None:
    """Have DTensor forget how operators lay out results: it keeps meshes, whose process groups may have ended."""
    _clear_sharding_prop_cache()


def default_store() -> Store:
    """The store in which the ranks of the default process group met."""
    return dist.distributed_c10d._get_default_store()


def version_of(tensor: torch.Tensor) -> int:
    """How often `tensor` was changed in place."""
    return tensor._version


def keeps_graph() -> bool:
    """Whether the backward pass that is running was asked to retain the graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_mutating(op: OpOverload) -> bool:
    """Whether `op` writes one of its arguments."""
    return bool(op._schema.is_mutable)


def returns_nothing(op: OpOverload) -> bool:
    """Whether `op` is called for its effect alone."""
    return not op._schema.returns


def aliases_argument(op: OpOverload) -> bool:
    """Whether a result of `op` shares storage with an argument that `op` does not write."""
    return any(a.alias_info is not None and not a.alias_info.is_write for a in op._schema.arguments)


def inductor_compile(
    module: torch.fx.GraphModule, fakes: list[Any], fake_mode: FakeTensorMode
) -> Callable[[list[Any]], Any]:
    """Inductor's code for a flat forward-only graph: a function of one list, which it empties."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    with fake_mode, tracing(TracingContext(fake_mode)):
        decomposed = make_fx(module, decomposition_table=select_decomp_table())(*fakes)
        return compile_fx_inner(decomposed, fakes)  # type: ignore[no-any-return]


def backend_of_halves(compile_half: Callable[[GraphModule], Callable[[list[Any]], Any]]) -> Any:
    """A backend of `torch.compile`. compile_half: makes of each half, forward and backward, a function of one list.

    The halves are split by torch's minimum cut, which computes again in backward what that is cheaper for.
    """
    from functorch.compile import min_cut_rematerialization_partition  # type: ignore[import-untyped]
    from torch._dynamo.backends.common import aot_autograd

    def compiler(module: GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        run = compile_half(module)

        def boxed(arguments: list[Any]) -> Any:
            return run(arguments)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)


@contextlib.contextmanager
def activation_memory_budget(share: float) -> Iterator[None]:
    """Have halves that are compiled inside save about this share, from 0 to 1, of what they save by themselves."""
    import torch._functorch.config as config

    with config.patch(activation_memory_budget=share):
        yield


@contextlib.contextmanager
def fresh_inductor_cache() -> Iterator[None]:
    """Have inductor compile everything anew inside, and forget it afterwards."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def symbolic_expression(value: torch.SymInt) -> sympy.Expr:
    """The expression over symbols that a symbolic size is."""
    return value.node.expr  # type: ignore[no-any-return]


def symbol_example(value: torch.SymInt, symbol: sympy.Symbol) -> int:
    """The value that a symbol of `value` has in the example it was captured with. Raises KeyError if it has none."""
    return int(value.node.shape_env.backed_var_to_val[symbol])


def symbol_range(value: torch.SymInt, symbol: sympy.Symbol) -> tuple[int | None, int | None]:
    """The least and largest value that a symbol of `value` may have; None where there is no bound."""
    found = value.node.shape_env.var_to_range[symbol]
    lower, upper = (int(bound) if isinstance(bound, sympy.Integer) else None for bound in (found.lower, found.upper))
    return lower, upper


def declare_symbol(
    fake_mode: FakeTensorMode, symbol: sympy.Symbol, example: int, bounds: tuple[int | None, int | None]
) -> None:
    """Make a symbol known to `fake_mode`, unless it is; bounds: least and largest value, None for no bound."""
    shapes = fake_mode.shape_env
    assert shapes is not None
    if symbol not in shapes.backed_var_to_val:
        shapes.add_backed_var_to_val(symbol, example)
        lower, upper = bounds
        shapes.constrain_symbol_range(
            symbol,
            compiler_min=-int_oo if lower is None else lower,  # type: ignore[arg-type]
            compiler_max=int_oo if upper is None else upper,  # type: ignore[arg-type]
        )


def symbolic_size(fake_mode: FakeTensorMode, expression: sympy.Expr) -> torch.SymInt:
    """A size of `fake_mode` from an expression over symbols it knows; symbolic even where that is a number."""
    shapes = fake_mode.shape_env
    assert shapes is not None
    return torch.SymInt(SymNode(expression, shapes, int, int(expression.xreplace(shapes.backed_var_to_val))))


def symbolic_function(name: str) -> Any:
    """The function of that name in expressions: torch's own, where it has one, or sympy's. Raises AttributeError."""
    return getattr(functions, name, None) or getattr(sympy, name)


@contextlib.contextmanager
def kernels_in_python() -> Iterator[None]:
    """Have operators run by their kernels in Python where they have one, as capture does: those keep sizes symbolic."""
    with enable_python_dispatcher():
        yield


def argument(op: OpOverload, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call gives for the operator's argument of that name, or its default; None if it has none such."""
    for position, described in enumerate(op._schema.arguments):
        if described.name == name:
            return args[position] if position < len(args) else kwargs.get(name, described.default_value)
    return None


def declared_arguments(op: OpOverload) -> dict[str, bool]:
    """Names of an operator's arguments, in order, and whether each is a tensor or a list of them."""
    return {described.name: "Tensor" in str(described.type) for described in op._schema.arguments}


def lazy_graph_module(root: nn.Module, graph: Graph) -> GraphModule:
    """A module of `graph` whose code is generated when it is first called or printed."""
    return _LazyGraphModule(root, graph)


def custom_function(tensor: torch.Tensor) -> type | None:
    """The `torch.autograd.Function` that gave `tensor`, if gradients flow through it; None where torch made it itself.

    It makes one of each operator with a registered gradient, and has one to hold the inputs of a checkpoint.
    """
    function = getattr(tensor.grad_fn, "_forward_cls", None)
    is_own = function is None or function.__module__.startswith(("torch._", "torch.utils.checkpoint"))
    return None if is_own else function


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[list[Callable[[torch.Tensor], Any]]]:
    """Take the `saved_tensors_hooks` in force out of force inside; gives their packing halves, outermost first."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield [pack for pack, _ in reversed(hooks)]
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def selective_checkpoints() -> list[SelectiveCheckpoint]:
    """What `create_selective_checkpoint_contexts` has put in force, outermost first; `policy_fn` of each decides."""
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, SelectiveCheckpoint)]


class BuffersAsMade(nn.Module):
    """A module whose own buffers keep their dtype when it is cast; their values are rounded, once."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        dtypes = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in dtypes.items():
            setattr(self, name, getattr(self, name).to(dtype))
        return self
