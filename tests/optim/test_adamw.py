"""The optimizer trains as torch's does, exchanges state with it, and keeps float32 masters of bfloat16 parameters."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.optim import AdamW
from tests.support.ranks import Ranks

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
Make = Callable[..., torch.optim.Optimizer]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(80, 7), nn.Tanh(), nn.Linear(7, 3))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> list[float]:
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_training_is_that_of_torch() -> None:
    ours, theirs = _model(), _model()
    expected = _train(theirs, torch.optim.AdamW(theirs.parameters(), **OPTIONS), 0, 10)
    assert _train(ours, AdamW(ours.parameters(), **OPTIONS), 0, 10) == pytest.approx(expected, rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_groups_schedules_and_closures_work_as_ever() -> None:
    def train(make: Make) -> list[torch.Tensor]:
        model = _model()
        first, *rest = model.parameters()
        groups = [{"params": [first], "lr": torch.tensor(0.1), "weight_decay": 0.0}, {"params": rest}]
        optimizer = make(groups, **OPTIONS)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        x = torch.ones(2, 3, 6, 6)

        def closure() -> float:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss.item()

        losses = []
        for _ in range(4):
            losses.append(optimizer.step(closure))
            schedule.step()
        return [torch.tensor(losses), *(parameter.detach() for parameter in model.parameters())]

    torch.testing.assert_close(train(AdamW), train(torch.optim.AdamW), rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_stay_and_count_no_step() -> None:
    model = _model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    frozen, *_, last = model.parameters()
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    _train(model, optimizer, 0, 2)
    frozen.requires_grad_(True)
    assert torch.equal(frozen, before) and frozen not in optimizer.state
    _train(model, optimizer, 2, 1)
    assert [int(optimizer.state[parameter]["step"]) for parameter in (frozen, last)] == [1, 3]


def test_a_gradient_scale_is_that_of_the_gradients() -> None:
    one, other = _model(), _model()
    optimizers = [AdamW(model.parameters(), **OPTIONS) for model in (one, other)]
    for model in (one, other):
        model(torch.ones(2, 3, 6, 6)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in one.parameters()]
    optimizers[0].step(gradient_scale=0.25)
    assert all(torch.equal(p.grad, held) for p, held in zip(one.parameters(), gradients, strict=True))
    for parameter in other.parameters():
        parameter.grad *= 0.25
    optimizers[1].step()
    assert _equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("into_fused", [False, True])
def test_state_dicts_go_to_torch_and_come_from_it(dtype: torch.dtype, into_fused: bool) -> None:
    makes: list[Make] = [AdamW, lambda params, **options: torch.optim.AdamW(params, fused=into_fused, **options)]
    for first, second in (makes, makes[::-1]):
        model = _model().to(dtype)
        before = first(model.parameters(), **OPTIONS)
        _train(model, before, 0, 3)
        twin = copy.deepcopy(model)
        after = second(twin.parameters(), lr=1.0)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        assert {key: after.param_groups[0][key] for key in OPTIONS} == OPTIONS
        losses = _train(model, before, 3, 3), _train(twin, after, 3, 3)
        assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == torch.float32 else 0.1)
        assert all(int(after.state[parameter]["step"]) == 6 for parameter in twin.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "through",
    [lambda value: copy.deepcopy(value), lambda value: pickle.loads(pickle.dumps(value))],
    ids=["deepcopy", "pickle"],
)
def test_training_resumes_bit_by_bit(dtype: torch.dtype, through: Callable[[Any], Any]) -> None:
    model = _model().to(dtype)
    optimizer = AdamW(model.parameters(), **OPTIONS)
    _train(model, optimizer, 0, 3)
    loaded = _model().to(dtype)
    state = through({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = AdamW(loaded.parameters())
    resumed.load_state_dict(state["optimizer"])
    loaded.load_state_dict(state["model"])
    both, both_optimizer = through((model, optimizer))
    losses = [_train(model, optimizer, 3, 3), _train(loaded, resumed, 3, 3), _train(both, both_optimizer, 3, 3)]
    assert losses[0] == losses[1] == losses[2]
    assert _equal(model, loaded) and _equal(model, both)


def test_bfloat16_parameters_are_rounded_from_float32_masters() -> None:
    model, master = _model().bfloat16(), _model().bfloat16().float()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    reference = AdamW(master.parameters(), **OPTIONS)
    for step in range(20):
        for low, high in zip(model.parameters(), master.parameters(), strict=True):
            low.grad = torch.randn(low.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            high.grad = low.grad.float()
        optimizer.step()
        reference.step()
    for low, high in zip(model.parameters(), master.parameters(), strict=True):
        state = optimizer.state[low]
        assert {key: value.dtype for key, value in state.items()} == dict.fromkeys(state, torch.float32)
        assert torch.equal(state["master"], high) and torch.equal(low, high.bfloat16())


def test_steps_smaller_than_bfloat16_resolves_add_up() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    torch.testing.assert_close(parameter.float(), torch.full((4,), 0.99), rtol=2**-8, atol=0)


def test_a_parameter_that_was_changed_in_place_becomes_its_master() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=1e-4)
    for value in (None, 5.0):
        if value is not None:
            with torch.no_grad():
                parameter.fill_(value)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["master"], torch.full((4,), 5.0), rtol=1e-4, atol=0)


def test_a_step_is_seen_by_autograd() -> None:
    parameter = nn.Parameter(torch.ones(4))
    loss = (parameter * parameter).sum()
    parameter.grad = torch.ones(4)
    AdamW([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "group 0: lr is -1.0, which is negative"),
        ({"eps": float("nan")}, "group 0: eps is nan"),
        ({"weight_decay": -0.1}, "group 0: weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"group 0: betas are \(0.9, 1.0\)"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(1))], **options)


def test_parameters_of_other_dtypes_are_refused() -> None:
    parameters = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).double())]
    with pytest.raises(TypeError, match=r"group 0: parameter 1 is torch.float64; .* torch.optim.AdamW others"):
        AdamW(parameters)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_state_that_only_torch_can_continue_is_refused(option: str) -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = AdamW([parameter], lr=0.5)
    with pytest.raises(ValueError, match=f"group 0: {option} is set"):
        optimizer.load_state_dict(torch.optim.AdamW([parameter], **{option: True}).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of a parameter \[4, 2\] is sparse"):
        AdamW(embedding.parameters()).step()


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 5), nn.Tanh(), nn.Linear(5, 1))


def _trained_shards(rank: int, world: int, plan: str, make: Make) -> list[torch.Tensor]:
    """Losses of five steps, then the whole parameters."""
    model = graphopt.compile(_mlp(), graphopt.Plan.parse(plan))
    optimizer = make(model.parameters(), **OPTIONS)
    losses = []
    for step in range(5):
        x = torch.randn(world, 4, 6, generator=torch.Generator().manual_seed(step))[rank]
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(parameter.full_tensor().detach() for parameter in model.parameters())]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_shards_train_as_with_torch(ranks: Callable[[int], Ranks], stage: int) -> None:
    plan = f"zero={stage},zero.whole_below=64"
    ours, theirs = (ranks(2).run(_trained_shards, plan, make) for make in (AdamW, torch.optim.AdamW))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def _bf16_shards(rank: int, world: int) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    value, gradient = torch.randn(5, 3).bfloat16(), torch.randn(5, 3).bfloat16()
    parameter = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    optimizer = AdamW([parameter], **OPTIONS)
    parameter.grad = distribute_tensor(gradient, mesh, [Replicate()])
    with pytest.raises(ValueError, match="its gradient otherwise"):
        optimizer.step()
    assert optimizer.state[parameter]["step"] == 0
    whole = nn.Parameter(value)
    reference = AdamW([whole], **OPTIONS)
    parameter.grad, whole.grad = distribute_tensor(gradient, mesh, [Shard(0)]), gradient
    for each in (optimizer, reference):
        each.step()
        each.step()
    state = optimizer.state[parameter]
    assert state["master"].placements == parameter.placements and state["master"].dtype == torch.float32
    assert torch.equal(state["master"].full_tensor(), reference.state[whole]["master"])
    return [parameter.full_tensor().detach(), whole.detach()]


def test_shards_in_bfloat16_have_masters_that_are_shards(ranks: Callable[[int], Ranks]) -> None:
    for sharded, whole in ranks(2).run(_bf16_shards):
        assert torch.equal(sharded, whole)


def _checkpointed(rank: int, world: int, folder: str) -> bool:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def trained(seed: int) -> tuple[nn.Module, AdamW]:
        model = graphopt.compile(_mlp(), graphopt.Plan.parse("zero=3,zero.whole_below=64"))
        optimizer = AdamW(model.parameters(), **OPTIONS)
        model(torch.full((2, 6), float(seed))).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained(1)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    other, other_optimizer = trained(2)
    weights, state = get_state_dict(other, other_optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=weights, optim_state_dict=state)
    return all(
        torch.equal(optimizer.state[a][key].to_local(), other_optimizer.state[b][key].to_local())
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
        for key in ("exp_avg", "exp_avg_sq")
    )


def test_distributed_checkpoints_hold_the_state(ranks: Callable[[int], Ranks], tmp_path_factory: Any) -> None:
    assert ranks(2).run(_checkpointed, str(tmp_path_factory.mktemp("checkpoint"))) == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_bytes_resume_bit_by_bit(dtype: torch.dtype) -> None:
    model = _model().to(dtype)
    optimizer = AdamW(model.parameters(), state_bits=8, **OPTIONS)
    _train(model, optimizer, 0, 3)
    loaded = _model().to(dtype)
    resumed = AdamW(loaded.parameters())
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    loaded.load_state_dict(model.state_dict())
    for state in resumed.state.values():
        assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg_sq_scales"].dtype == torch.float32
    assert _train(model, optimizer, 3, 3) == _train(loaded, resumed, 3, 3)
    assert _equal(model, loaded)


@pytest.mark.parametrize("bits", [8, 32])
def test_what_only_the_device_knows_scales_and_skips(bits: int) -> None:
    one, other = _model(), _model()
    ours, theirs = (AdamW(model.parameters(), state_bits=bits, **OPTIONS) for model in (one, other))
    for model in (one, other):
        model(torch.ones(2, 3, 6, 6)).sum().backward()
    before = copy.deepcopy(one)
    ours.step(skip=torch.tensor(1.0))
    assert _equal(one, before)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    ours.step(gradient_scale=torch.tensor(0.25), skip=torch.tensor(0.0))
    theirs.step(gradient_scale=0.25)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_states_of_bytes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="group 0: state_bits is 4, not 8 or 32"):
        AdamW([nn.Parameter(torch.zeros(2))], state_bits=4)
    with pytest.raises(TypeError, match="group 0: parameter 0 is not contiguous; state_bits=32 takes it"):
        AdamW([nn.Parameter(torch.zeros(2, 3).t())], state_bits=8)
