"""SGD, Adagrad, Lion, Adam and LAMB over lists of tensors: on a GPU in a launch for many tensors, on the CPU in C++.

`update` is one pass over memory (LAMB's two). What a step must know of all gradients before it changes anything, their
norm and whether each is finite, is found by `gradient_norm` in a pass before it, and stays on the device.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from graphopt.cuda_ext.arguments import ELEMENTS, FLOAT32, check
from graphopt.cuda_ext.byte_states import ByteState, scale_count
from graphopt.cuda_ext.cuda import kernels
from graphopt.cuda_ext.library import Library, library
from graphopt.cuda_ext.lists import Run, grouped, norm_of_lists, update_lists
from graphopt.cuda_ext.rules import Rule

__all__ = ["Norm", "Run", "by_operators", "gradient_norm", "update"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """float32 without dimensions, on the gradients' device.

    norm: of all gradients as one vector; scale: what to multiply them with so that it is the most allowed; skip: 1 if
    an element is not finite, else 0.
    """

    norm: torch.Tensor
    scale: torch.Tensor
    skip: torch.Tensor


def update(
    runs: Sequence[Run], rule: Rule, *, scale: torch.Tensor | None = None, skip: torch.Tensor | None = None
) -> None:
    """One step of `rule` on every run; nobody waits for a GPU, on the CPU torch's number of threads share the work.

    scale: float32 without dimensions, what gradients are multiplied by beside `gradient_scale`; skip: likewise, nothing
    is changed unless it is 0. Both may be of `gradient_norm`, and are best where the runs are.

    Raises ValueError that names the run and its tensor which does not fit, before any is changed.
    """
    for index, run in enumerate(runs):
        _check(run, index, rule)
    for name, number in (("scale", scale), ("skip", skip)):
        if number is not None:
            check(name, number, (), FLOAT32, device=number.device)
    for device, alike in grouped(runs, lambda run: run.parameter.device).items():
        _update_on(device, alike, rule, *(None if each is None else each.to(device) for each in (scale, skip)))
    # What watches tensors for changes (autograd, gathered copies of parameters) cannot see this one.
    torch.autograd.graph.increment_version([tensor for run in runs for tensor in run.changed()])


def gradient_norm(gradients: Sequence[torch.Tensor], *, most: float | None = None, gradient_scale: float = 1.0) -> Norm:
    """The norm of all gradients, contiguous and of one device, in one pass; sums have one order, whatever the device.

    most: of the norm that `scale` brings it to, as ``torch.nn.utils.clip_grad_norm_`` does; by default it is 1.
    gradient_scale: what gradients count for. Squares are float32: above 1e19 a norm may be infinite where no gradient
    is. Raises ValueError that names the gradient which does not fit.
    """
    if not gradients:
        raise ValueError("gradients is empty: there is nothing to find the norm of")
    device = gradients[0].device
    for index, gradient in enumerate(gradients):
        check(f"gradients[{index}]", gradient, gradient.shape, _FLOATS, device=device)
    if most is not None and not most >= 0:
        raise ValueError(f"most is {most}, not a norm")
    found = kernels("optimizers.cu", device)
    if found is None:
        return _norm_by_operators(gradients, most, gradient_scale)
    return Norm(*norm_of_lists(found, gradients, most, gradient_scale).unbind())


def _update_on(
    device: torch.device, runs: list[Run], rule: Rule, scale: torch.Tensor | None, skip: torch.Tensor | None
) -> None:
    is_plain = device.type == "cpu" and scale is None and skip is None
    for source, alike in grouped(runs, lambda run: _source(run) if is_plain else _kernels(run)).items():
        if source == "optimizers.cpp":
            native = library(source)
            if native is not None:
                _update_simple(native, alike, rule)
                continue
        else:
            found = kernels(source, device)
            if found is not None:
                update_lists(found, alike, rule, scale, skip)
                continue
        for run in alike:
            by_operators(run, rule, scale, skip)


def _source(run: Run) -> str:
    """What has this run on the CPU."""
    narrow = (run.gradient, *(() if run.copy is None else (run.copy,)))
    is_simple = run.parameter.dtype == torch.float32 and all(tensor.dtype in ELEMENTS for tensor in narrow)
    return "optimizers.cpp" if is_simple and not run.has_bytes else _kernels(run)


def _kernels(run: Run) -> str:
    return "byte_optimizers.cu" if run.has_bytes else "optimizers.cu"


def _update_simple(native: Library, runs: Sequence[Run], rule: Rule) -> None:
    words = [word for run in runs for word in _words(run)]
    factors = torch.tensor([float(each) for each in (rule.gradient_scale, *rule.factors)], dtype=torch.float32)
    table = (ctypes.c_int64 * len(words))(*words)
    if rule.number is None:
        native.call("lamb", table, factors, len(runs))
    else:
        native.call("optimize", table, factors, len(runs), rule.number)


def _check(run: Run, index: int, rule: Rule) -> None:
    parameter, where, name = run.parameter, f"run {index}:", type(rule).__name__
    shape, device = parameter.shape, parameter.device
    check(f"{where} parameter", parameter, shape, _FLOATS, device=device)
    is_wide = parameter.dtype == torch.float32
    check(f"{where} gradient", run.gradient, shape, _FLOATS if is_wide else (parameter.dtype,), device=device)
    if len(run.states) != rule.state_count:
        raise ValueError(f"{where} states has {len(run.states)} tensors, {name} has {rule.state_count}")
    for number, state in enumerate(run.states):
        what = f"{where} states[{number}]"
        if isinstance(state, ByteState) != run.has_bytes:
            raise ValueError(f"{what} is a {type(state).__name__}, states[0] a {type(run.states[0]).__name__}")
        if not isinstance(state, ByteState):
            check(what, state, shape, FLOAT32, device=device)
        elif not rule.has_bytes:
            raise ValueError(f"{what} is a ByteState, {name} has states in float32 only")
        else:
            check(f"{what}.codes", state.codes, shape, (torch.uint8,), device=device)
            check(f"{what}.scales", state.scales, (scale_count(parameter),), FLOAT32, device=device)
    if run.copy is not None:
        if not is_wide:
            raise ValueError(f"{where} copy is of a parameter in {parameter.dtype}, not in torch.float32")
        check(f"{where} copy", run.copy, shape, _HALVES, device=device)


def _words(run: Run) -> tuple[int, ...]:
    """The run as optimizers.cpp reads it."""
    states = [state.data_ptr() for state in run.states if isinstance(state, torch.Tensor)]
    return (
        run.parameter.data_ptr(),
        run.gradient.data_ptr(),
        *[*states, 0, 0][:2],
        0 if run.copy is None else run.copy.data_ptr(),
        run.parameter.numel(),
        run.gradient.dtype == torch.bfloat16,
    )


@torch.no_grad()
def by_operators(run: Run, rule: Rule, scale: torch.Tensor | None = None, skip: torch.Tensor | None = None) -> None:
    """`update` of one run by torch's operators, of any strides."""
    gradient = run.gradient.float() * rule.gradient_scale
    if scale is not None:
        gradient = gradient * scale
    parameter = run.parameter.to(torch.float32, copy=True)
    states = [
        state.values(is_signed=number == 0) if isinstance(state, ByteState) else state.clone()
        for number, state in enumerate(run.states)
    ]
    rule.apply(parameter, gradient, states)
    results = [parameter]
    for number, (before, after) in enumerate(zip(run.states, states, strict=True)):
        results += ByteState.of(after, is_signed=number == 0) if isinstance(before, ByteState) else [after]
    results += [] if run.copy is None else [parameter]
    for tensor, result in zip(run.changed(), results, strict=True):
        tensor.copy_(result if skip is None else torch.where(skip == 0, result.to(tensor.dtype), tensor))


def _norm_by_operators(gradients: Sequence[torch.Tensor], most: float | None, gradient_scale: float) -> Norm:
    squares = torch.stack([gradient.float().square().sum(dtype=torch.float64) for gradient in gradients])
    norm = squares.sum().sqrt() * abs(gradient_scale)
    scale = torch.ones_like(norm) if most is None else (most / (norm + 1e-6)).clamp(max=1)
    is_finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
    return Norm(norm.float(), scale.float(), (~is_finite).float())
