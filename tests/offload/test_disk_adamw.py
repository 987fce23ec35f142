"""AdamW with its state on disk takes the steps of AdamW with its state in memory, bit for bit."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

import graphopt
from graphopt import Plan, Zero
from graphopt.errors import OffloadError
from graphopt.offload import DiskAdamW
from graphopt.optim import AdamW
from tests.support.ranks import Ranks

CHUNK = 3 * 4096  # several to a step, most parameters cut


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 40), nn.Tanh(), nn.Linear(40, 5)).to(dtype)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() <= 1], "lr": 1e-2, "betas": (0.8, 0.99)},
    ]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        model(torch.randn(6, 33, generator=generator).to(dtype)).square().mean().backward()
        if step % 2:
            next(iter(model.parameters())).grad = None  # as of a layer that was not used
        optimizer.step()
        optimizer.zero_grad()


def _same(a: Any, b: Any) -> bool:
    """Equal in every bit, structure and placement included."""
    if isinstance(a, DTensor) or isinstance(b, DTensor):
        return type(a) is type(b) and a.placements == b.placements and _same(a.to_local(), b.to_local())
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _same_parameters(a: nn.Module, b: nn.Module) -> bool:
    return _same(dict(a.named_parameters()), dict(b.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checked", [False, True])
def test_steps_and_state_are_those_in_memory(tmp_path: Path, dtype: torch.dtype, checked: bool) -> None:
    ours, theirs = _model(dtype), _model(dtype)
    with DiskAdamW(_groups(ours), tmp_path, chunk_size=CHUNK, checked=checked) as on_disk:
        in_memory = AdamW(_groups(theirs))
        _train(ours, on_disk, 5)
        _train(theirs, in_memory, 5)
        assert _same_parameters(ours, theirs)
        assert _same(on_disk.state_dict(), in_memory.state_dict())
        for each, optimizer in ((ours, on_disk), (theirs, in_memory)):  # what changes on the way is seen
            optimizer.param_groups[0]["lr"] = 0.03
            with torch.no_grad():
                list(each.parameters())[2].mul_(0.5)
            optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(7, dtype=dtype)))]})
            optimizer.param_groups[-1]["params"][0].grad = torch.full([7], 0.5, dtype=dtype)
            _train(each, optimizer, 3, seed=1)
        assert _same_parameters(ours, theirs)
        assert _same(on_disk.state_dict(), in_memory.state_dict())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [AdamW, torch.optim.AdamW], ids=["graphopt", "torch"])
@pytest.mark.parametrize("to_disk", [True, False])
def test_state_dicts_are_exchanged(tmp_path: Path, other: Callable[..., torch.optim.Optimizer], to_disk: bool) -> None:
    """Go on from a saved state, from memory to disk or the other way, as if nothing had happened."""
    first, second = _model(), _model()
    with (
        DiskAdamW(_groups(first if not to_disk else second), tmp_path / "a", chunk_size=CHUNK) as on_disk,
        DiskAdamW(_groups(_model()), tmp_path / "b", chunk_size=CHUNK) as unused,
    ):
        in_memory = other(_groups(first if to_disk else second))
        source, target = (in_memory, on_disk) if to_disk else (on_disk, in_memory)
        _train(first, source, 4)
        _train(second, target, 1, seed=9)  # what is there already is replaced
        torch.save({"model": first.state_dict(), "optimizer": source.state_dict()}, tmp_path / "saved")
        saved = torch.load(tmp_path / "saved", mmap=True)
        second.load_state_dict(saved["model"])
        target.load_state_dict(saved["optimizer"])
        unused.load_state_dict(saved["optimizer"])  # whose parameters have had no gradient yet
        for loaded in (target, unused):
            assert _same(loaded.state_dict()["state"], source.state_dict()["state"])
        if other is AdamW:
            _train(first, source, 2)
            _train(second, target, 2)
            assert _same_parameters(first, second)


def test_state_that_was_dropped_starts_from_zeros(tmp_path: Path) -> None:
    ours, theirs = _model(), _model()
    with DiskAdamW(ours.parameters(), tmp_path) as on_disk:
        in_memory = AdamW(theirs.parameters())
        for each, optimizer in ((ours, on_disk), (theirs, in_memory)):
            _train(each, optimizer, 2)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
            _train(each, optimizer, 2)
        assert _same_parameters(ours, theirs)


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with DiskAdamW(_groups(_model()), tmp_path) as optimizer:
        state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(65, 33)}
        groups = optimizer.state_dict()["param_groups"]
        with pytest.raises(ValueError, match=r"exp_avg_sq of '0\.weight' is missing, the parameter \[65, 33\]"):
            optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
        state["exp_avg_sq"] = torch.zeros(33, 65)
        with pytest.raises(ValueError, match=r"is \[33, 65\] on this rank, the parameter \[65, 33\]"):
            optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict({"state": {}, "param_groups": groups[:1]})
        assert not optimizer.state


def test_closures_scales_and_unusual_layouts(tmp_path: Path) -> None:
    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(2, 3, 40, 50, generator=generator)
        shapes = [base.to(memory_format=torch.channels_last), base[0, 0].t(), base[:, 0, :, 0].clone(), torch.zeros(0)]
        return [nn.Parameter(each) for each in shapes]

    ours, theirs = parameters(), parameters()
    with DiskAdamW(ours, tmp_path, chunk_size=CHUNK) as on_disk:
        for each, optimizer in ((ours, on_disk), (theirs, AdamW(theirs))):
            for _ in range(3):

                def closure(each: list[nn.Parameter] = each) -> torch.Tensor:
                    loss = torch.stack([(p * p).sum() for p in each]).sum()
                    loss.backward()
                    return loss

                assert optimizer.step(closure, gradient_scale=0.25) is not None
                optimizer.zero_grad()
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, theirs, strict=True))
        sparse = nn.Parameter(torch.ones(3))
        on_disk.add_param_group({"params": [sparse]})
        sparse.grad = torch.ones(3).to_sparse()
        with pytest.raises(ValueError, match="gradient of 'parameter 0 of group 1' is sparse"):
            on_disk.step()


def test_a_file_that_is_lost_names_parameter_and_step(tmp_path: Path) -> None:
    model = _model()
    with DiskAdamW(model.named_parameters(), tmp_path, chunk_size=CHUNK) as optimizer:
        _train(model, optimizer, 2)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        next(tmp_path.glob("rank0-*/float320.tensor")).unlink()
        with pytest.raises(
            OffloadError, match=r"^step 3, state of '0\.weight', elements 0 to \d+: cannot read .*No such"
        ):
            _train(model, optimizer, 1)
    with DiskAdamW(model.named_parameters(), tmp_path, chunk_size=CHUNK) as optimizer:  # from the last checkpoint on
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        _train(model, optimizer, 1)


def test_a_dropped_optimizer_leaves_no_files(tmp_path: Path) -> None:
    model = _model()
    optimizer = DiskAdamW(model.parameters(), tmp_path)
    _train(model, optimizer, 1)
    state = optimizer.state_dict()
    expected = copy.deepcopy(state)
    del optimizer
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert _same(state, expected)  # which outlives it


def _sharded(rank: int, world: int, folder: str) -> None:
    """The steps of AdamW in memory, on shards and on whole parameters; state through a distributed checkpoint."""
    models = [graphopt.compile(_model(), Plan(zero=Zero(3, whole_below=64))) for _ in range(2)]
    with DiskAdamW(_groups(models[0]), f"{folder}/state", chunk_size=CHUNK) as on_disk:
        in_memory = AdamW(_groups(models[1]))
        for model, optimizer in zip(models, (on_disk, in_memory), strict=True):
            _train(model, optimizer, 4, seed=rank)
        assert _same_parameters(*models)
        ours, theirs = on_disk.state_dict(), in_memory.state_dict()
        assert _same(ours, theirs)
        assert world == 1 or isinstance(ours["state"][0]["exp_avg"], DTensor)

        saved = get_optimizer_state_dict(models[0], on_disk)
        checkpoint.save(saved, checkpoint_id=f"{folder}/checkpoint")
        _train(models[0], on_disk, 1, seed=5)
        loaded = get_optimizer_state_dict(models[0], on_disk)
        checkpoint.load(loaded, checkpoint_id=f"{folder}/checkpoint")
        set_optimizer_state_dict(models[0], on_disk, loaded)
        assert _same(on_disk.state_dict()["state"], theirs["state"])


@pytest.mark.parametrize("world", [1, 2])
def test_each_rank_has_its_own_part_on_disk(ranks: Callable[[int], Ranks], tmp_path: Path, world: int) -> None:
    ranks(world).run(_sharded, str(tmp_path))


def _losing(rank: int, world: int, folder: str) -> str:
    model = graphopt.compile(_model(), Plan(zero=3))
    optimizer = DiskAdamW(_groups(model), folder, chunk_size=CHUNK)
    _train(model, optimizer, 1)
    if rank == 1:
        next(Path(folder).glob("rank1-*/float320.tensor")).unlink()
    with pytest.raises(OffloadError) as caught:
        _train(model, optimizer, 1)
    optimizer.close()
    return str(caught.value)


def test_a_rank_that_loses_a_file_stops_all(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    said = ranks(2).run(_losing, str(tmp_path))
    assert said[0] == f"rank 1: {said[1]}"
    assert said[1].startswith("step 2, state of '0.weight', elements 0 to")
    assert "No such file" in said[1]
