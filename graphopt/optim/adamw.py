"""AdamW in one pass over memory, for plain parameters and for shards, in float32 and bfloat16."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from graphopt._torch import local_tensor, version_of
from graphopt.cuda_ext import adamw, optimizers
from graphopt.cuda_ext.adamw import Settings
from graphopt.cuda_ext.byte_states import ByteState

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALES = tuple(f"{name}_scales" for name in _MOMENTS)
_MASTER = "master"


class AdamW(Optimizer):
    """``torch.optim.AdamW`` in one pass over memory: the same arguments, results and state, on the CPU and on GPUs.

    Parameters are float32 or bfloat16, plain tensors or DTensors, of which each rank updates its own part. One in
    bfloat16 is the rounded copy of a float32 master, which is state; a parameter that somebody else changes in place
    becomes its master anew.

    State, by parameter: ``step``, ``exp_avg``, ``exp_avg_sq`` as torch has them, float32 also for bfloat16 parameters,
    and for those ``master``. A state dict of ``torch.optim.AdamW`` can be loaded, and the other way round.

    state_bits: 32, or 8: moments are then codes of one byte, with ``exp_avg_scales`` and ``exp_avg_sq_scales`` for each
    256 elements (`graphopt.cuda_ext.byte_states.ByteState`), which torch's AdamW cannot load. Parameters are contiguous
    and no DTensors then.

    lr, eps, weight_decay: not negative; betas: in [0, 1). Raises ValueError for others, TypeError for parameters of
    other dtypes.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
    ) -> None:
        self._versions: dict[torch.Tensor, int] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_bits": state_bits}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1], len(self.param_groups) - 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for index, group in enumerate(state["param_groups"]):
            group.setdefault("state_bits", 32)  # of a state dict of torch.optim.AdamW
            _check_group(group, index)
        super().__setstate__(state)
        self._versions = {}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        gradient_scale: float | torch.Tensor = 1.0,
        skip: torch.Tensor | None = None,
    ) -> float | None:
        """Update every parameter that has a gradient; the closure's loss, if one is given.

        gradient_scale: what gradients count for: a clipping factor, or one over the scale of the loss. They are left as
        they are. skip: no parameter and no moment is changed unless it is 0; the step counts. Either may be a tensor of
        no dimensions in float32 on the parameters' device, where nobody waits for it: see
        `graphopt.cuda_ext.optimizers.gradient_norm`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, factor = None, 1.0
        if isinstance(gradient_scale, torch.Tensor):
            scale = gradient_scale
        else:
            factor = gradient_scale
        for group in self.param_groups:
            due: dict[int, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    due[int(self._state_of(parameter, group["state_bits"])["step"]) + 1].append(parameter)
            for step, parameters in due.items():
                settings = settings_of(group, step, factor)
                if group["state_bits"] == 8:
                    wide = [_byte_run(parameter, self.state[parameter]) for parameter in parameters]
                    optimizers.update(wide, settings.rule, scale=scale, skip=skip)
                else:
                    runs = [_run(parameter, self.state[parameter]) for parameter in parameters]
                    adamw.update(runs, settings, scale=scale, skip=skip)
                for parameter in parameters:
                    self.state[parameter]["step"].fill_(step)
                self._note_change(parameters)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer, except that state of bfloat16 parameters stays float32, and codes stay bytes."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if key in (*_MOMENTS, *_SCALES, _MASTER):  # torch casts them to the dtype of the parameter
                    dtype = torch.uint8 if value.dtype == torch.uint8 else torch.float32
                    if self.state[parameter][key].dtype != dtype:
                        self.state[parameter][key] = value.to(parameter.device, dtype)

    def _state_of(self, parameter: torch.Tensor, bits: int) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key, scales in zip(_MOMENTS, _SCALES, strict=True):
                if bits == 8:
                    state[key], state[scales] = ByteState.zeros(parameter)
                else:
                    state[key] = torch.zeros_like(parameter, dtype=torch.float32)
        if parameter.dtype == torch.bfloat16:
            version = _version(parameter)
            if _MASTER not in state or self._versions.get(parameter, version) != version:
                state[_MASTER] = parameter.float()
        return state

    def _note_change(self, parameters: list[torch.Tensor]) -> None:
        # The update saw the local tensors only.
        torch.autograd.graph.increment_version([each for each in parameters if isinstance(each, DTensor)])
        self._versions.update({each: _version(each) for each in parameters if each.dtype == torch.bfloat16})


def settings_of(group: Mapping[str, Any], step: int, gradient_scale: float) -> Settings:
    """A parameter group's hyperparameters at its parameters' `step`, the first of which is 1."""
    beta1, beta2 = group["betas"]
    return Settings(
        step, float(group["lr"]), (float(beta1), float(beta2)), group["eps"], group["weight_decay"], gradient_scale
    )


def _byte_run(parameter: torch.Tensor, state: dict[str, Any]) -> optimizers.Run:
    gradient = _gradient(parameter).contiguous()
    moments = tuple(ByteState(state[key], state[scales]) for key, scales in zip(_MOMENTS, _SCALES, strict=True))
    if parameter.dtype == torch.bfloat16:
        return optimizers.Run(state[_MASTER], gradient, moments, parameter)
    return optimizers.Run(parameter, gradient, moments)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise ValueError(f"the gradient of a parameter {list(parameter.shape)} is sparse; AdamW wants a dense one")
    return gradient


def _run(parameter: torch.Tensor, state: dict[str, Any]) -> adamw.Run:
    gradient = _gradient(parameter)
    tensors = [parameter, gradient, *(state[key] for key in _MOMENTS)]
    if parameter.dtype == torch.bfloat16:
        tensors = [state[_MASTER], *tensors[1:], parameter]
    if isinstance(parameter, DTensor):
        if getattr(gradient, "placements", None) != parameter.placements:
            raise ValueError(
                f"a parameter {list(parameter.shape)} is placed {parameter.placements}, its gradient otherwise: "
                "redistribute the gradient before the step"
            )
        tensors = [local_tensor(tensor) for tensor in tensors]
    return adamw.Run(*tensors)


def _version(parameter: torch.Tensor) -> int:
    return version_of(local_tensor(parameter))


def _check_group(group: dict[str, Any], index: int) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"group {index}: {name} is {group[name]}, which is negative")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"group {index}: betas are {group['betas']}; each is at least 0 and less than 1")
    for name in ("amsgrad", "maximize"):  # of a state dict of torch.optim.AdamW
        if group.get(name):
            raise ValueError(f"group {index}: {name} is set, which torch.optim.AdamW alone can do")
    if group["state_bits"] not in (8, 32):
        raise ValueError(f"group {index}: state_bits is {group['state_bits']}, not 8 or 32")
    for position, parameter in enumerate(group["params"]):
        if group["state_bits"] == 8 and (isinstance(parameter, DTensor) or not parameter.is_contiguous()):
            what = "a DTensor" if isinstance(parameter, DTensor) else "not contiguous"
            raise TypeError(f"group {index}: parameter {position} is {what}; state_bits=32 takes it")
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"group {index}: parameter {position} is {parameter.dtype}; "
                "AdamW updates torch.float32 and torch.bfloat16, torch.optim.AdamW others"
            )
