"""nn.Module and example inputs -> forward graph, with no device memory and no real parameter."""

import contextlib
import io
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec
from torch.export.graph_signature import InputKind as ExportInput
from torch.export.graph_signature import OutputKind as ExportOutput
from torch.fx.traceback import preserve_node_meta

from graphopt._torch import BatchNorm, FakeTensorMode, new_fake_mode, reparametrized, tracing_with
from graphopt.capture.arguments import CallSpec
from graphopt.capture.assignments import settled
from graphopt.capture.call import call_model
from graphopt.capture.checkpoints import MarkCheckpoints, without_reentrance
from graphopt.capture.draws import draw_as_laid_out
from graphopt.capture.gradients import KeepNoGrad, reader_of_lost_values, refuse_custom_functions
from graphopt.capture.layers import layer_of, repeated_layers
from graphopt.capture.shared_buffers import SharedBuffers
from graphopt.capture.structure import Template, take_apart
from graphopt.errors import CaptureError
from graphopt.ir import Input, InputKind, Level, NodeFacts, Output, OutputKind, Program

_SOURCE_LINE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_LIBRARY = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parents[1])


@dataclass
class Capture:
    """A captured call.

    output: rebuilds what `forward` returns from the values of the program's user outputs.
    names: of the batch tensors, in call order (also the names of their roles).
    """

    program: Program
    fake_mode: FakeTensorMode
    output: Template
    names: list[str]


class _Flat(nn.Module):
    """The model with flat tensors in and out, so that any argument and any returned object can be captured.

    call: calls the given model with flat tensors. It is a function, since export copies what else a module holds.
    """

    def __init__(self, model: nn.Module, call: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.call(self.model, tensors)


_PREFIX = "model."


def capture(
    model: nn.Module,
    tensors: list[torch.Tensor],
    spec: CallSpec,
    names: list[str],
    *,
    apply: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any] = call_model,
    compute_dtype: torch.dtype | None = None,
    contiguous: bool = False,
    dynamic: Callable[[str, int], tuple[int, ...]] | None = None,
) -> Capture:
    """Capture one call of `model` as a functional forward graph.

    tensors, spec: the call, from `flatten_call`; names: of its tensors. Only shapes, dtypes and devices are read.
    apply: what is captured: (model, args, kwargs) -> what is returned.
    compute_dtype: dtype that floating parameters and inputs are captured in; None for their own.
    contiguous: whether parameters will lie so, as distributed ones do, whatever strides they have now.
    dynamic: (name, number of dimensions) -> the dimensions of that tensor whose size stays symbolic.
    Raises CaptureError with the model's source line where `forward` cannot be captured.
    """
    fake_mode = new_fake_mode()
    templates: list[Template] = []
    checkpoints = MarkCheckpoints()

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        if not torch.is_grad_enabled():
            yield
            return
        with KeepNoGrad(), checkpoints, without_reentrance():
            yield

    def call(module: nn.Module, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        args, kwargs = spec.rebuild(values)
        outputs: list[torch.Tensor] = []
        with shared.lent(), settled(module), watched():
            templates.append(take_apart(apply(module, args, kwargs), outputs))
            refuse_custom_functions(outputs)
        return tuple(outputs)

    flat = _Flat(model, call)
    shared = SharedBuffers(model, flat)
    examples = tuple(_as_computed(tensor, compute_dtype) for tensor in tensors)
    state = _fake_state(model, fake_mode, compute_dtype, contiguous)
    try:
        with (
            warnings.catch_warnings(),
            _one_error(),
            tracing_with(fake_mode),
            reparametrized(model, state),
            shared.lifted(),
            preserve_node_meta(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own use of its tree specs
            exported = torch.export.export(
                flat, examples, strict=False, dynamic_shapes=_dynamic_shapes(names, tensors, dynamic)
            )
            lost = reader_of_lost_values(exported, fake_mode)
            if lost is None:
                _interpret_parts(exported.graph_module)
                exported = exported.run_decompositions({})
    except Exception as error:
        raise _explained(error, model) from error
    if lost is not None:
        line = _SOURCE_LINE.findall(lost.meta.get("stack_trace") or "")
        where = f" at {line[-1][0]}:{line[-1][1]}" if line else ""
        raise CaptureError(
            f"{type(model).__name__}.forward{where} reads a tensor through .data, where capture loses sight of it; "
            "write .detach() instead"
        )
    program = _with_roles(exported, names, model, shared.names)
    _state_facts(program.graph, model, checkpoints)
    draw_as_laid_out(program.graph, fake_mode)
    return Capture(program, fake_mode, templates[-1], names)


def _interpret_parts(module: fx.GraphModule) -> None:
    """Have autocast regions, which are graphs within the graph, run node by node: as code they lose what nodes know."""
    for part in module.modules():
        if part is not module and isinstance(part, fx.GraphModule):
            part.forward = fx.Interpreter(part).run


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Where export fails torch prints the graph so far, once for each of its wrappers; the error says enough."""
    said = io.StringIO()
    partial = "\0"
    try:
        with contextlib.redirect_stderr(said):
            yield
    except Exception as error:
        partial = f"{getattr(error, 'partial_fx_graph', partial)}\n"
        raise
    finally:
        sys.stderr.write(said.getvalue().replace(partial, ""))


def _as_computed(tensor: torch.Tensor, compute_dtype: torch.dtype | None) -> torch.Tensor:
    """What stands for an example input: itself, or memory that nobody touches where dtype or device will be others."""
    dtype = compute_dtype if compute_dtype is not None and tensor.is_floating_point() else tensor.dtype
    if dtype == tensor.dtype and tensor.device.type != "meta":
        return tensor
    example = torch.empty_like(tensor, dtype=dtype, device=_device(tensor), requires_grad=False)
    return example.requires_grad_(tensor.requires_grad)


def kept_as_stored(model: nn.Module) -> set[int]:
    """Ids of the parameters that compute in the dtype they are stored in, whatever the precision.

    Those of batch norms: their kernels want the dtype of the running statistics.
    """
    norms = (module for module in model.modules() if isinstance(module, BatchNorm))
    return {id(parameter) for norm in norms for parameter in norm.parameters()}


def _fake_state(
    model: nn.Module, fake_mode: FakeTensorMode, compute_dtype: torch.dtype | None, contiguous: bool
) -> dict[str, torch.Tensor]:
    """A fake stand-in for each parameter and buffer by every name it has; tied ones share theirs."""
    stand_ins: dict[int, torch.Tensor] = {}
    stored = kept_as_stored(model)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in stand_ins:
            is_cast = parameter.is_floating_point() and id(parameter) not in stored
            dtype = compute_dtype if compute_dtype is not None and is_cast else parameter.dtype
            value = _fake_like(parameter, fake_mode)
            value = (value.contiguous() if contiguous else value).to(dtype)
            stand_ins[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        state[name] = stand_ins[id(parameter)]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if id(buffer) not in stand_ins:
            stand_ins[id(buffer)] = _fake_like(buffer, fake_mode)
        state[name] = stand_ins[id(buffer)]
    return state


def _fake_like(tensor: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    with fake_mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_device(tensor))


def _device(tensor: torch.Tensor) -> torch.device:
    """Where the tensor will live when the program runs: a meta tensor stands for one on the CPU."""
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _dynamic_shapes(
    names: list[str], tensors: list[torch.Tensor], dynamic: Callable[[str, int], tuple[int, ...]] | None
) -> Any:
    if dynamic is None:
        return None
    automatic = torch.export.Dim.AUTO  # type: ignore[attr-defined]
    return (tuple(dict.fromkeys(dynamic(name, t.dim()), automatic) for name, t in zip(names, tensors, strict=True)),)


def _with_roles(
    exported: torch.export.ExportedProgram, names: list[str], model: nn.Module, lifted: Mapping[str, str]
) -> Program:
    """Turn export's signature into roles; tied names become one input, constants get a place of their own.

    lifted: names of buffers that were registered under others for export, by those.
    """
    signature: ExportGraphSignature = exported.graph_signature
    aliases = _aliases(model)
    known = {**aliases, **lifted}
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    placeholders = exported.graph_module.graph.find_nodes(op="placeholder")
    batch = iter(names)
    inputs: list[Input] = []
    for input_spec, node in zip(signature.input_specs, placeholders, strict=True):
        inputs.append(_input_role(input_spec, node, batch, known, trainable))
    outputs = [_output_role(s, i, known) for i, s in enumerate(signature.output_specs)]
    module = fx.GraphModule(exported.graph_module, exported.graph_module.graph)
    program = Program(module, inputs, outputs, Level.FORWARD, aliases)
    _merge_duplicates(program)
    wanted = {role.name for role in program.inputs if role.kind is InputKind.CONSTANT}
    program.constants = {name: value for name, value in exported.constants.items() if name in wanted}  # type: ignore[misc]
    return program


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every further name of a tied parameter or buffer -> its first name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
    return aliases


def _input_role(spec: InputSpec, node: fx.Node, batch: Any, aliases: Mapping[str, str], trainable: set[str]) -> Input:
    if spec.kind is ExportInput.USER_INPUT:
        value = node.meta.get("val")
        return Input(InputKind.BATCH, next(batch), isinstance(value, torch.Tensor) and value.requires_grad)
    assert spec.target is not None
    if spec.kind is ExportInput.CONSTANT_TENSOR:
        return Input(InputKind.CONSTANT, spec.target)
    name = spec.target.removeprefix(_PREFIX)
    name = aliases.get(name, name)
    if spec.kind is ExportInput.PARAMETER:
        return Input(InputKind.PARAMETER, name, name in trainable)
    if spec.kind is ExportInput.BUFFER:
        return Input(InputKind.BUFFER, name)
    raise CaptureError(f"the model uses an input of kind {spec.kind.name} ({spec.target}), which cannot be captured")


def _output_role(spec: OutputSpec, position: int, aliases: Mapping[str, str]) -> Output:
    if spec.kind is ExportOutput.BUFFER_MUTATION:
        assert spec.target is not None
        name = spec.target.removeprefix(_PREFIX)
        return Output(OutputKind.BUFFER, aliases.get(name, name))
    if spec.kind is ExportOutput.USER_OUTPUT:
        return Output(OutputKind.USER, str(position))
    raise CaptureError(f"the model changes {spec.target} in place ({spec.kind.name}), which cannot be captured")


def _merge_duplicates(program: Program) -> None:
    """Read a tied parameter through one placeholder."""
    first: dict[tuple[InputKind, str], fx.Node] = {}
    for role, node in list(zip(program.inputs, program.placeholders, strict=True)):
        if role.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            continue
        kept = first.setdefault((role.kind, role.name), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            program.remove_input(node)


def _state_facts(graph: fx.Graph, model: nn.Module, checkpoints: MarkCheckpoints) -> None:
    layers = repeated_layers(model)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        path = next((path for path, _ in reversed(stack.values())), "")
        module = "" if path == _PREFIX[:-1] else path.removeprefix(_PREFIX)
        lines = _SOURCE_LINE.findall(node.meta.get("stack_trace") or "")
        source = f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else None
        mark = checkpoints.mark_of(node)
        facts = NodeFacts(
            module=module,
            source=source,
            layer=layer_of(module, layers),
            checkpoint=mark.region if mark is not None else None,
            checkpoint_saves=tuple(sorted(mark.saved)) if mark is not None else (),
        )
        node.meta = {"val": node.meta.get("val"), "graphopt": facts}


def _explained(error: Exception, model: nn.Module) -> CaptureError:
    """One message for whatever export raised: the line of the model it happened at, and what to do."""
    line = _model_line(error)
    where = f" at {line}" if line else ""
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    dependent = (
        "data-dependent" in str(error).lower()
        or "GuardOnDataDependent" in type(error).__name__
        or "unbacked" in str(error)
    )
    if dependent:
        return CaptureError(
            f"{type(model).__name__}.forward{where} lets Python decide on the values of a tensor, which a graph cannot "
            "hold; compute both sides and choose with torch.where, or pass the decision in as a Python argument"
            f" ({reason})"
        )
    kind = "" if isinstance(error, CaptureError) else f"{type(error).__name__}: "
    return CaptureError(f"{type(model).__name__}.forward could not be captured{where}: {kind}{reason}")


def _model_line(error: BaseException | None) -> str | None:
    """File and line of the innermost frame that belongs neither to torch nor to graphopt."""
    found = None
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__):
            if not frame.filename.startswith((_LIBRARY, _HERE, "<")) and "contextlib" not in frame.filename:
                found = f"{frame.filename}:{frame.lineno} (in {frame.name}: {frame.line})"
        if found:
            return found
        error = error.__cause__ or error.__context__
    return found
