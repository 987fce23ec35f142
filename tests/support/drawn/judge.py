"""Whether a compiled module does what the uncompiled one does: pass by pass, and in training."""

import contextlib
import copy
import dataclasses
import pkgutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

import graphopt
from graphopt import Plan
from graphopt.capture.export import kept_as_stored
from graphopt.inspect.differential import Comparison, check
from graphopt.passes.base import Tier

FACTOR = 4.0  # how much farther from float64 than eager a result may lie
STEPS = 3

Results = dict[str, torch.Tensor]  # by what they are


class Disagreement(AssertionError):
    """A compiled module did something else than the uncompiled one."""


@dataclass(frozen=True)
class Subject:
    """What is judged.

    model: makes the module. batch: (rank, step) -> keyword arguments of a call. registry: where the passes come from.
    coarse: some of it computes in bfloat16. pure: nothing in it is random.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], dict[str, torch.Tensor]]
    plan: Plan
    ranks: int
    registry: str = "graphopt.passes:REGISTRY"
    coarse: bool = False

    @property
    def epsilon(self) -> float:
        coarse = self.coarse or (self.plan.precision is not None and self.plan.precision.compute == "bf16")
        return torch.finfo(torch.bfloat16 if coarse else torch.float32).eps

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().train()


def judge_passes(subject: Subject) -> None:
    """Verify the program after every pass; run it on all ranks in this process, and compare pass by pass.

    Raises Disagreement, or what the compiler raises.
    """
    registry = pkgutil.resolve_name(subject.registry)
    plan = subject.plan.resolve(subject.ranks)
    model, batch = subject.build(), subject.batch(0, 0)
    verdict = check(model, (), batch, plan, registry, verify=True)
    if verdict.guilty is not None and not _is_rounding(verdict.guilty, subject, plan):
        raise Disagreement(f"{verdict.guilty}, first at {verdict.node}")
    # In one process sums are taken in one order, so without casts no pass may change a bit, whatever its tier allows;
    # but means over ranks are rounded as parameters are stored, and parameters of several ranks lie in order, where
    # eager's may be transposed. What is just captured runs without autograd, for which some kernels are others.
    rounds = plan.precision is not None or (subject.coarse and subject.ranks > 1)
    lies_as_in_eager = subject.ranks == 1 or all(p.is_contiguous() for p in model.parameters())
    _, *rewritten = verdict.comparisons
    for index, each in enumerate(() if rounds else rewritten):
        is_beside_eager = index == 0
        if each.worst > 0 and each.tier is not Tier.WHOLE_BATCH and (lies_as_in_eager or not is_beside_eager):
            raise Disagreement(f"{each.name} changes bits: {each}")


def _is_rounding(guilty: Comparison, subject: Subject, plan: Plan) -> bool:
    """Whether it is only that sums are taken in another order, which some modules amplify: not in float64, or what is
    compared is nothing but rounding, and zero in truth.
    """
    if guilty.tier is Tier.BITWISE:
        return False
    if _size_of_gradient(guilty.role, subject) < 1e-12:
        return True
    plan = dataclasses.replace(plan, precision=None)
    batch = {name: t.detach().to(_wide(t)) for name, t in subject.batch(0, 0).items()}
    verdict = check(subject.build().double(), (), batch, plan, pkgutil.resolve_name(subject.registry))
    return max(each.worst for each in verdict.comparisons) < max(1e-10, 1e-6 * guilty.worst)  # shrinks with epsilon


def _size_of_gradient(role: str, subject: Subject) -> float:
    """Of the largest element, in float64, where one loss is taken of one batch; infinite if it is no gradient."""
    model = subject.build().double()
    outputs = model(**{name: t.detach().to(_wide(t)) for name, t in subject.batch(0, 0).items()})
    losses = [leaf for leaf in pytree.tree_leaves(outputs) if leaf.dim() == 0 and leaf.requires_grad]
    if not losses:
        return float("inf")
    sum(losses).backward()
    gradients = {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(gradients[role].abs().max()) if role in gradients else float("inf")


def judge_training(found: list[Results], subject: Subject) -> None:
    """Compare a few steps of training, as every rank gave them, with eager's: bit for bit in a world of one, else with
    float64 as the measure. Raises Disagreement.
    """
    eager, exact = reference(subject), reference(subject, exact=True)
    for rank, results in enumerate(found):
        if results.keys() != eager[rank].keys():
            raise Disagreement(f"rank {rank} gives {sorted(results.keys() ^ eager[rank].keys())} on one side only")
        for name, result in results.items():
            wanted, measure = eager[rank][name], exact[rank][name]
            if (result.dtype, result.shape) != (wanted.dtype, wanted.shape):
                raise Disagreement(f"rank {rank}: {name} is {_kind(result)}, in eager {_kind(wanted)}")
            if subject.ranks == 1 and subject.plan.precision is None:
                if not torch.equal(result.nan_to_num(), wanted.nan_to_num()):
                    raise Disagreement(f"{name} is not eager's to the bit: {result} against {wanted}")
            elif _apart(result, measure) > FACTOR * _apart(wanted, measure) + 64 * subject.epsilon * _size(measure):
                raise Disagreement(f"rank {rank}: {name} is {result}, in eager {wanted}, in float64 {measure}")


def trained(subject: Subject, rank: int) -> Results:
    """A few steps of training of the compiled module on this rank, then, in small worlds, a call in evaluation."""
    model = graphopt.compile(subject.build(), subject.plan)
    optimizer = _optimizer(model)
    results: Results = {}
    for step in range(STEPS):
        batch = subject.batch(rank, step)
        results |= _ran(model, batch, step)
        results |= {f"gradient {n} {step}": _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        _update(optimizer)
    return results | _afterwards(model, model, subject.batch(rank, STEPS), subject.ranks)


def trained_on_all(subject: Subject) -> list[Results]:
    """`trained` on every rank, in processes of their own where there are several."""
    if subject.ranks == 1:
        return [trained(subject, 0)]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_join_and_train, (subject, folder), nprocs=subject.ranks)
        return [torch.load(Path(folder) / str(rank)) for rank in range(subject.ranks)]


def _join_and_train(rank: int, subject: Subject, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=subject.ranks)
    torch.save(trained(subject, rank), Path(folder) / str(rank))
    dist.destroy_process_group()


def reference(subject: Subject, exact: bool = False) -> list[Results]:
    """The same of the uncompiled module on every rank: each has its buffers, all have the mean gradient.

    exact: in float64.
    """
    models = [subject.build() for _ in range(subject.ranks)]
    replicas = [_Replica(model, subject.plan, exact) for model in models]
    optimizers = [_optimizer(model) for model in models]
    found: list[Results] = [{} for _ in models]
    for step in range(STEPS):
        for rank, replica in enumerate(replicas):
            found[rank] |= _ran(replica, replica.leaves(subject.batch(rank, step)), step)
            replica.take_over()
        _average([dict(model.named_parameters()) for model in models])
        for model, optimizer, results in zip(models, optimizers, found, strict=True):
            named = model.named_parameters()
            results |= {f"gradient {n} {step}": p.grad.clone() for n, p in named if p.grad is not None}
            _update(optimizer)
    with _without_fast_attention():
        for rank, replica in enumerate(replicas):
            found[rank] |= _afterwards(
                replica.model, replica, replica.leaves(subject.batch(rank, STEPS)), subject.ranks
            )
    return found


@contextlib.contextmanager
def _without_fast_attention() -> Iterator[None]:
    """In evaluation torch has another kernel for `nn.MultiheadAttention`, of other bits, which capture does not see."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class _Replica:
    """The uncompiled module in the dtype of its measure, called in that in which the plan computes."""

    def __init__(self, model: nn.Module, plan: Plan, exact: bool) -> None:
        self.is_exact = exact
        self.model = model.double() if exact else model
        self.dtype = None if exact or plan.precision is None else plan.precision.compute_dtype
        self.called = model

    def leaves(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch in the dtype of the measure."""
        if not self.is_exact:
            return batch
        return {name: t.detach().to(_wide(t)).requires_grad_(t.requires_grad) for name, t in batch.items()}

    def __call__(self, **batch: torch.Tensor) -> Any:
        if self.dtype is None:
            return self.model(**batch)
        self.called = copy.deepcopy(self.model)
        stored = kept_as_stored(self.called)
        for parameter in self.called.parameters():
            if parameter.is_floating_point() and id(parameter) not in stored:
                parameter.data = parameter.data.to(self.dtype)
        return self.called(**{n: t.to(self.dtype) if t.is_floating_point() else t for n, t in batch.items()})

    def take_over(self) -> None:
        """Buffers and gradients of the module that was called."""
        if self.called is self.model:
            return
        for own, other in zip(self.model.buffers(), self.called.buffers(), strict=True):
            own.copy_(other)
        for own, other in zip(self.model.parameters(), self.called.parameters(), strict=True):
            own.grad = None if other.grad is None else other.grad.to(own.dtype)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.is_floating_point() else tensor.dtype


def _ran(call: Any, batch: dict[str, torch.Tensor], step: int) -> Results:
    """Outputs of a call and, after backward, the gradients of its batch."""
    torch.manual_seed(1_000 + step)
    outputs = [leaf for leaf in pytree.tree_leaves(call(**batch)) if isinstance(leaf, torch.Tensor)]
    results = {f"output {index} {step}": output.detach().clone() for index, output in enumerate(outputs)}
    wanted = [output for output in outputs if output.requires_grad]
    losses = [output for output in wanted if output.dim() == 0] or wanted
    if losses and torch.is_grad_enabled():
        sum(output.square().sum() for output in losses).backward()
    for name, tensor in batch.items():
        if tensor.grad is not None:
            results[f"gradient of {name} {step}"] = tensor.grad
    return results


def _afterwards(model: nn.Module, call: Any, batch: dict[str, torch.Tensor], ranks: int) -> Results:
    """Parameters, buffers, and in small worlds outputs in evaluation."""
    results = {f"parameter {name}": _whole(p) for name, p in model.named_parameters()}
    if ranks <= 2:  # a capture more, on every rank
        model.eval()
        with torch.no_grad():
            results |= _ran(call, batch, STEPS)
    if isinstance(call, _Replica):
        call.take_over()
    return results | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


def _average(replicas: list[dict[str, nn.Parameter]]) -> None:
    """Give every replica the mean gradient, summed in the order of the ranks."""
    for name, first in replicas[0].items():
        if first.grad is None:
            continue
        total = first.grad
        for other in replicas[1:]:
            total = total + other[name].grad
        for replica in replicas:
            replica[name].grad = total / len(replicas)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _update(optimizer: torch.optim.Optimizer) -> None:
    """A step of bounded size: where training diverges it magnifies its own rounding, and nothing can be compared."""
    for group in optimizer.param_groups:
        nn.utils.clip_grad_value_(group["params"], 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; infinite where one is a number and the other is not."""
    if one.numel() == 0:
        return 0.0
    a, b = one.double(), other.double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return float(apart.nan_to_num(float("inf"), float("inf")).max())


def _size(tensor: torch.Tensor) -> float:
    """Of the largest element, at least one."""
    return float(max(1.0, tensor.double().nan_to_num(0.0, 0.0, 0.0).abs().max())) if tensor.numel() else 1.0
