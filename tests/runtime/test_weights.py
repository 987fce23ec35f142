"""Weights into models from the meta device: what each rank reads and holds, what is said of files that do not fit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import graphopt
from graphopt import GraphoptError, Plan, RankMismatchError
from graphopt._torch import local_tensor
from graphopt.ir.layout import ParameterLayout, Split
from tests.support.pipelined import is_here, place_of
from tests.support.training import whole
from tests.support.zoo import ZOO

PLANS = [
    "pp=2,dp=2,zero=3,zero.whole_below=64,pipeline.microbatches=4",
    "pp=2,tp=2,pipeline=zbv,pipeline.microbatches=2",
    "dp=2,tp=2,zero=2,zero.whole_below=64",
    "dp=4,zero=3,zero.whole_below=0",
]
State = dict[str, torch.Tensor]


def _on_meta(name: str, text: str, rank: int, world: int) -> tuple[Any, dict[str, Any]]:
    entry, plan = ZOO[name], Plan.parse(text).resolve(world)
    torch.manual_seed(0)
    batch = entry.part(entry.batch(), place_of(plan, rank), plan.data_parallel_ranks)
    with torch.device("meta"):
        model = entry.build().train()
    return graphopt.compile(model, plan, example_inputs=batch), batch


def _held(model: nn.Module) -> State:
    """Parameters of this rank's stages, whole, and the buffers."""
    parameters = {name: whole(p) for name, p in model.named_parameters() if is_here(p)}
    return parameters | dict(model.named_buffers())


def _bytes(model: nn.Module) -> int:
    return sum(local_tensor(p).untyped_storage().nbytes() for p in model.parameters() if p.numel())


def _loaded(rank: int, world: int, name: str, paths: list[str]) -> list[tuple[State, int, float]]:
    found = []
    for text in PLANS:
        for path in paths if text == PLANS[0] else paths[:1]:
            model, batch = _on_meta(name, text, rank, world)
            graphopt.load_weights(model, path)
            found.append((_held(model), _bytes(model), float(model.train_step(batch))))
    return found


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
def test_each_rank_reads_what_lies_on_it(ranks, tmp_path: Path, name: str) -> None:
    model = ZOO[name].build()
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "one")
    dcp.save({"model": model.state_dict(), "step": torch.tensor(3)}, checkpoint_id=tmp_path / "distributed")
    one = tmp_path / "one" / "model.safetensors"
    paths = [str(tmp_path / "parts"), str(one), str(tmp_path / "distributed")]
    whole_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())
    of_ranks = ranks(4).run(_loaded, name, paths)
    for found in of_ranks:
        for held, _, loss in found:
            assert [key for key, value in held.items() if not torch.equal(value, wanted[key])] == []
            assert math.isfinite(loss)
    for index in (
        0,
        -1,
    ):  # sharded over all four ranks; padding, norms and a tied embedding are what is beyond a quarter
        held = sum(found[index][1] for found in of_ranks)
        assert whole_bytes <= held < 1.5 * whole_bytes


def _begun(rank: int, world: int, name: str, texts: list[str]) -> list[State]:
    found = []
    for text in texts:
        model, batch = _on_meta(name, text, rank, world)
        torch.manual_seed(5 + rank)  # that of the first rank counts
        graphopt.init_weights(model)
        found.append(_held(model))
        assert torch.isfinite(model.train_step(batch))
    return found


def test_a_model_begins_alike_under_every_plan(ranks) -> None:
    (wanted,) = _begun(0, 1, "llama", ["dp=1"])
    for found in ranks(4).run(_begun, "llama", [PLANS[0], PLANS[2]]):
        for held in found:
            assert [key for key, value in held.items() if not torch.equal(value, wanted[key])] == []
    fresh = {name: p.detach() for name, p in ZOO["llama"].build().named_parameters()}
    for name, value in fresh.items():
        assert float(wanted[name].mean()) == pytest.approx(float(value.mean()), abs=0.1 / value.numel() ** 0.5), name
        assert float(wanted[name].std()) == pytest.approx(float(value.std()), rel=0.3, abs=1e-9), name


class _Net(nn.Module):
    """Names that files may lack; a buffer that they hold, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 4)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def reset_parameters(self) -> None:
        self.scale.fill_(2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.last(self.norm(self.first(x))) * self.scale).square().mean()


def _net() -> Any:
    with torch.device("meta"):
        model = _Net()
    return graphopt.compile(model, "dp=1")


def _saved(path: Path, change: Any = None) -> tuple[Path, State]:
    state = {name: value.contiguous() for name, value in _Net().state_dict().items()}
    state["first.weight"] = torch.randn(6, 4)
    (change or (lambda state: None))(state)
    save_file(state, path / "net.safetensors")
    return path / "net.safetensors", state


def test_buffers_are_loaded_or_computed(tmp_path: Path) -> None:
    path, state = _saved(tmp_path, lambda state: state["norm.running_var"].fill_(3.0))
    model = _net()
    graphopt.load_weights(model, path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.scale.tolist() == [2.0] * 4
    model(torch.randn(3, 4)).backward()
    assert model.first.weight.grad.device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("norm.weight"), r"the files lack norm.weight \(for norm.weight there is none to choose\)"),
        (
            lambda s: s.update({"last.bais": s.pop("last.bias")}),
            r"lack last.bias .*the nearest is 'last.bais'.*no last.ba",
        ),
        (lambda s: s.update(more=torch.ones(2)), "the model has no more; say strict=False"),
        (lambda s: s.update({"last.bias": torch.ones(5)}), r"last.bias is \[4\], \[5\] in the files"),
    ],
    ids=["missing", "misspelt", "unexpected", "shape"],
)
def test_names_that_do_not_fit_are_named(tmp_path: Path, change: Any, said: str) -> None:
    path, _ = _saved(tmp_path, change)
    with pytest.raises(GraphoptError, match=said):
        graphopt.load_weights(_net(), path)


def test_what_no_file_gave_is_still_missing(tmp_path: Path) -> None:
    path, _ = _saved(tmp_path, lambda state: state.pop("norm.weight"))
    model = _net()
    graphopt.load_weights(model, path, strict=False)
    with pytest.raises(GraphoptError, match=r"norm.weight of a model from the meta device have no values yet"):
        model(torch.randn(3, 4))


def test_two_copies_of_a_model_need_a_prefix(tmp_path: Path) -> None:
    state = _Net().state_dict()
    dcp.save({"model": state, "average": {k: v + 1 for k, v in state.items()}}, checkpoint_id=tmp_path)
    with pytest.raises(GraphoptError, match=r"behind '\w+\.' and behind '\w+\.'; say prefix="):
        graphopt.load_weights(_net(), tmp_path)
    model = _net()
    graphopt.load_weights(model, tmp_path, prefix="average.")
    assert torch.equal(model.last.bias, state["last.bias"] + 1)


def test_bad_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(GraphoptError, match="cannot be read"):
        graphopt.load_weights(_net(), tmp_path / "broken.safetensors")
    with pytest.raises(GraphoptError, match=r"nowhere holds no weights; give a .safetensors file"):
        graphopt.load_weights(_net(), tmp_path / "nowhere")
    with torch.device("meta"):
        linear = nn.Linear(4, 4)
        with pytest.raises(GraphoptError, match=r"say graphopt.compile"):
            graphopt.compile(linear, "dp=1")
    with pytest.raises(GraphoptError, match="is for a model on the meta device, this one is on cpu"):
        graphopt.compile(nn.Linear(4, 4), "dp=1", device="cuda")


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.ones(4), persistent=False)


def test_a_buffer_that_nobody_computes_is_named() -> None:
    with torch.device("meta"):
        model = nn.Sequential(_Unknown())
    with pytest.raises(
        GraphoptError, match=r"0.table on the meta device need values: _Unknown has no reset_parameters"
    ):
        graphopt.compile(model, "dp=1")


def test_a_module_that_cannot_begin_is_named() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.PReLU(), nn.MultiheadAttention(4, 1))
    graphopt.compile(model, "dp=1")
    with pytest.raises(GraphoptError, match=r"1.in_proj_weight, .*MultiheadAttention has no reset_parameters"):
        graphopt.init_weights(model)


def _one_lacks_the_file(rank: int, world: int, path: str) -> str:
    model = graphopt.compile(nn.Linear(4, 4), "dp=2,zero=3,zero.whole_below=0")
    with pytest.raises(GraphoptError) as caught:
        graphopt.load_weights(model, path if rank == 0 else path + ".away")
    assert isinstance(caught.value, RankMismatchError) == (rank == 0)
    return str(caught.value)


def test_a_file_that_one_rank_lacks_fails_on_all(ranks, tmp_path: Path) -> None:
    save_file(nn.Linear(4, 4).state_dict(), tmp_path / "linear.safetensors")
    first, second = ranks(2).run(_one_lacks_the_file, str(tmp_path / "linear.safetensors"))
    assert "rank 1 failed: GraphoptError" in first and "holds no weights" in second


def _waiting(rank: int, world: int, path: str) -> None:
    model = graphopt.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "tp=2")
    with pytest.raises(GraphoptError, match=r"give example_inputs to graphopt.compile"):
        graphopt.load_weights(model, path)


def test_where_parameters_lie_must_be_known(ranks, tmp_path: Path) -> None:
    ranks(2).run(_waiting, str(tmp_path))


def test_slices_are_where_the_parts_lie() -> None:
    whole_value = torch.arange(12 * 10).view(12, 10)
    splits = (Split("tp", 2, 1), Split("ep", 2, 0))
    layout = ParameterLayout.choose("w", (12, 10), torch.float32, "dp", 4, False, splits)
    for place in ({"tp": t, "ep": e, "dp": d} for t in range(2) for e in range(2) for d in range(4)):
        start, rows = layout.local_rows(place["dp"])
        assert torch.equal(whole_value[layout.slices(place)], layout.part(whole_value, place)[start : start + rows])
