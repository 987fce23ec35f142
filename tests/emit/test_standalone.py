"""A step as a file of its own: runs where there is no graphopt, and gives the bits that the simulator gives."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.emit.index_bounds import index_bound
from graphopt.emit.module import load_source
from graphopt.emit.split import split
from graphopt.emit.standalone import standalone_source
from graphopt.errors import GraphoptError
from graphopt.inspect import simulate
from graphopt.inspect.simulate import Simulation
from graphopt.ir import InputKind, Program, moves
from graphopt.ir.moves import LEAVE
from graphopt.lowering import Compilation
from tests.support.moved import attention_program, forward, step
from tests.support.programs import Mlp, lowered
from tests.support.zoo import CONVNET, WITH_DROPOUT, ZOO, Entry, loss_of

ENTRIES: dict[str, Entry] = {**ZOO, **{f"{k} with dropout": v for k, v in WITH_DROPOUT.items()}, "convnet": CONVNET}
Lines = dict[tuple[int, str], str]


class Streams:
    """Random numbers of each rank from a stream of its own, as processes have them."""

    running: "Streams | None" = None

    def __init__(self, rank: int) -> None:
        Streams.running = None
        self._state = torch.Generator().manual_seed(1 + rank).get_state()

    def seed(self) -> None:
        """Let the default generator go on where this rank left it."""
        before = Streams.running
        if before is not self:
            if before is not None:
                before._state = torch.get_rng_state()
            torch.set_rng_state(self._state)
            Streams.running = self


def _written(folder: Path, compilation: Compilation, mesh: dict[str, int]) -> Path:
    path = folder / "program.py"
    title = "A step"
    path.write_text(
        standalone_source(compilation.halves, mesh, compilation.layouts, title=title, name=path.name), encoding="utf-8"
    )
    return path


def _environment(folder: Path) -> dict[str, str]:
    """One in which nobody can import graphopt."""
    (folder / "graphopt.py").write_text("raise ImportError('there is no graphopt here')\n")
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def _run(path: Path, *launcher: str) -> Lines:
    command = [sys.executable, *launcher, str(path)]
    where: Any = {"env": _environment(path.parent), "cwd": path.parent}
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **where)
    assert found.returncode == 0, found.stderr
    lines: Lines = {}
    for line in found.stdout.splitlines():
        rank, role, value = line.split(": ", 2)
        lines[int(rank.removeprefix("rank ")), role] = value
    return lines


def _simulated(module: ModuleType, program: Program, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """What all ranks get on the inputs of the file, in this process."""
    monkeypatch.setattr(simulate, "SeededDraws", Streams)
    step = module.STEP
    given = [step.inputs(rank, 0) for rank in range(step.ranks)]
    # An input that neither half reads is not in the file.
    inputs = [[values.get((role.kind.value, role.name)) for values in given] for role in program.inputs]
    values = dict(zip(program.placeholders, inputs, strict=True))
    with torch.no_grad():
        values.update(Simulation(program, step.mesh).run(inputs))
    return {
        (rank, str(role)): module.described(values[node][rank])
        for role, node in zip(program.outputs, program.results, strict=True)
        if node is not None
        for rank in range(step.ranks)
    }


CASES = [
    ("llama", "zero=0"),
    ("llama", "zero=3,zero.whole_below=0,dynamic=batch"),
    ("gpt2 with dropout", "zero=3,zero.whole_below=0,zero.prefetch=2,precision=bf16"),
    ("t5 with dropout", "zero=1,zero.whole_below=0"),
    ("convnet", "zero=2,zero.whole_below=0"),
    ("convnet", "zero=3,batch_norm=global"),
    ("odd", "zero=3,zero.whole_below=0"),
    ("llama", "zero=3,zero.whole_below=0,offload=disk,offload.least_bytes=0,offload.state=true"),
    ("gpt2 with dropout", "zero=1,zero.whole_below=0,offload=host,offload.least_bytes=0"),
]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_a_file_gives_the_bits_of_the_program(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ENTRIES[name]
    compilation, program = lowered(text, 2, entry.build().train(), **entry.batch())
    path = _written(tmp_path, compilation, {"dp": 2})
    assert "graphopt" not in path.read_text()
    found = _run(path)
    assert found == _simulated(load_source(path), program, monkeypatch)
    gradients = {role for _, role in found if role.startswith("gradient")}
    assert len(gradients) > 5 and all("nan" not in value and "inf" not in value for value in found.values())


@pytest.mark.parametrize("name", ["llama", "convnet"])
def test_a_file_gives_what_the_model_gives(name: str, tmp_path: Path) -> None:
    """Norms of gradients, over all shards, are those of the uncompiled model's mean gradients."""
    model = ENTRIES[name].build().train()
    compilation, _ = lowered("zero=3,zero.whole_below=0", 2, model, **ENTRIES[name].batch())
    path = _written(tmp_path, compilation, {"dp": 2})
    found, step = _run(path), load_source(path).STEP
    for rank in range(2):
        values = step.inputs(rank, 0)
        state = {name: value for (kind, name), value in values.items() if kind in ("parameter", "buffer")}
        model.load_state_dict(state, strict=False)
        for buffer, held in model.named_buffers():
            held.copy_(state.get(buffer, held))
        loss = loss_of(model(**{name: value for (kind, name), value in values.items() if kind == "batch"}))
        shown = next(value for (where, role), value in found.items() if where == rank and role.startswith("user"))
        assert _number(shown, "sum") == pytest.approx(loss.item(), rel=1e-5)
        (loss / 2).backward()
    for name, parameter in model.named_parameters():
        norms = [_number(found[rank, f"gradient {name}"], "norm") for rank in range(2)]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(parameter.grad.norm().item(), rel=1e-4, abs=1e-7)


def _number(line: str, what: str) -> float:
    words = line.split()
    return float(words[words.index(what) + 1])


def test_moves_between_ranks_are_in_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = (2, "tp")
    program, mode = forward(
        (4, 6),
        [
            (moves.SCATTER_SUM, (1, 2, 2, *own)),
            (moves.GATHER, (1, 2, 3, *own, True)),
            (moves.PART, (0, 1, 2, *own, True)),
            (moves.ALL_TO_ALL, (1, 0, *own)),
            (moves.GATHER, (1, 1, 6, *own, False)),
            (moves.FIRST, ("tp",)),
            (moves.LEAVE, ("tp",)),
        ],
    )
    step(program, mode, {"tp": 2})
    path = tmp_path / "program.py"
    path.write_text(standalone_source(split(program), {"tp": 2}, {}, title="Moves", name=path.name))
    found = _run(path)
    assert len(found) == 4 and found == _simulated(load_source(path), program, monkeypatch)


def test_attention_over_a_folded_sequence_is_in_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, mode = attention_program(2, 4, 4, 2, None)
    step(program, mode, {"cp": 2})
    path = tmp_path / "program.py"
    path.write_text(standalone_source(split(program), {"cp": 2}, {}, title="Attention", name=path.name))
    assert "graphopt" not in path.read_text()
    found = _run(path)
    assert len(found) == 8 and found == _simulated(load_source(path), program, monkeypatch)


def test_torchrun_starts_it_too(tmp_path: Path) -> None:
    path = _written(tmp_path, lowered("zero=3,zero.whole_below=0", 2)[0], {"dp": 2})
    launched = _run(path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert launched == _run(path)


def test_one_rank_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        compilation, program = lowered("dp=1", 1, Mlp().eval())
    path = _written(tmp_path, compilation, {"dp": 1})
    found = _run(path)
    assert list(found) == [(0, "user 0")] and found == _simulated(load_source(path), program, monkeypatch)


def test_what_it_runs_on_needs_torch_alone() -> None:
    compilation, _ = lowered("zero=0", 1)
    tree = ast.parse(standalone_source(compilation.halves, {"dp": 1}, compilation.layouts, title="", name=""))
    imported = [
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    assert set(imported) <= {*sys.stdlib_module_names, "torch"}


def test_an_operator_that_is_not_torchs_is_named() -> None:
    compilation, _ = lowered("zero=0", 1)
    node = compilation.halves.forward.compute_nodes()[0]
    node.target = LEAVE
    with pytest.raises(GraphoptError, match=f"{node.name} calls graphopt.leave.default, which torch alone"):
        standalone_source(compilation.halves, {"dp": 1}, compilation.layouts, title="", name="")


class _Lookups(nn.Module):
    """Indices of several tables, moved around on their way, and a mask that is summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 4), nn.Embedding(9, 4)
        self.table: torch.Tensor
        self.register_buffer("table", torch.randn(30, 4))

    def forward(
        self, words: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        found = self.words(words[:, 1:]) + self.words(words.flip(0)[:, :-1]) + self.places(mask.cumsum(1)[:, 1:])
        found = found + self.table[rows].unsqueeze(1) + self.table[:2].index_select(0, rows).unsqueeze(1)
        return nn.functional.cross_entropy(found.flatten(0, 1), labels.reshape(-1))


def test_integers_lie_within_what_they_index() -> None:
    call = {
        "words": torch.zeros(2, 6, dtype=torch.int64),
        "rows": torch.zeros(2, dtype=torch.int64),
        "mask": torch.ones(2, 6, dtype=torch.int64),
        "labels": torch.zeros(2, 5, dtype=torch.int64),
    }
    compilation, _ = lowered("zero=0", 1, _Lookups(), **call)
    forward = compilation.halves.forward
    bounds = {role.name: index_bound(forward, node) for role, node in forward.nodes_of(InputKind.BATCH)}
    assert bounds == {"words": 50, "rows": 2, "mask": None, "labels": 4}
