"""The command line: every view as text and JSON, and one line for every mistake."""

import json
import subprocess
import sys

import pytest

FACTORY = """
import torch
from torch import nn

def model():
    with torch.device("meta"):
        made = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(4)))
    return made, (torch.empty(8, 512, device="meta"),)

def broken():
    raise ValueError("no weights today")

def nothing():
    return 3

def wordy():
    raise ValueError("first\\nsecond")

def misfit():
    return nn.Linear(4, 4), {"nonsense": torch.empty(2, 4)}

def real():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), (torch.randn(4, 8),)

def narrow():
    return nn.Linear(4, 4), (torch.empty(2, 5),)

class TwoOutputs(nn.Module):
    # The scalar, where a gradient is expected first, reaches no parameter: it is compiled a second time.
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
    def forward(self, x):
        return x.sum(), self.linear(x)

def two_outputs():
    return TwoOutputs(), (torch.empty(4, 8),)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("inspect") / "factory.py"
    path.write_text(FACTORY)
    return str(path)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graphopt.inspect.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("view", ["summary", "passes", "communication", "memory", "graph", "source"])
def test_every_view_as_text_and_json(target: str, view: str) -> None:
    plan = ["--plan", "dp=1024,zero=3"]
    text = _run(view, f"{target}:model", *plan)
    assert text.returncode == 0 and text.stdout, text.stderr
    values = _run(view, f"{target}:model", *plan, "--json")
    assert values.returncode == 0 and json.loads(values.stdout)


def test_a_check_compares_every_pass(target: str) -> None:
    plan = ["--plan", "dp=2,zero=3,zero.whole_below=0"]
    shown = _run("check", f"{target}:real", *plan)
    assert shown.returncode == 0 and shown.stdout.count("agrees") == 6, shown.stderr
    values = json.loads(_run("check", f"{target}:real", *plan, "--json").stdout)
    assert values["guilty"] is None and [each["worst"] for each in values["passes"]] == [0.0] * 6


def test_bytes_on_many_ranks(target: str) -> None:
    found = json.loads(_run("communication", f"{target}:model", "--plan", "dp=256,zero=3", "--json").stdout)
    whole = 4 * 512 * 512 * 4
    gathers = [row["bytes"] for row in found["collectives"] if row["collective"] == "all-gather"]
    # The first layer's input wants no gradient, so its weight is not gathered for backward.
    assert gathers == [pytest.approx((2 - 1 / 4) * whole * 255 / 256)]


def test_a_target_alone_gives_the_summary(target: str) -> None:
    given = [f"{target}:model", "--plan", "dp=4,zero=3", "--json"]
    alone, named = (json.loads(_run(*view, *given).stdout) for view in ([], ["summary"]))
    assert alone.keys() == named.keys() and alone["communication"] == named["communication"]


def test_a_graph_is_that_of_the_compilation_that_counts(target: str) -> None:
    """Of two compilations of one call, the second has the gradients."""
    shown = _run("graph", f"{target}:two_outputs", "--after", "differentiate").stdout
    assert "output (gradient linear.weight) = None" not in shown and "output (gradient linear.weight) = " in shown


def test_a_view_that_does_not_exist_is_told_the_nearest(target: str) -> None:
    found = _run("memry", f"{target}:model")
    assert found.returncode == 2 and "memory" in found.stderr and "Traceback" not in found.stderr


def test_a_difference_and_a_graph_in_between(target: str) -> None:
    changed = _run("diff", f"{target}:model", "schedule", "--plan", "dp=2,zero=3").stdout
    assert changed.startswith("--- before") and "all_gather" in changed
    first = _run("diff", f"{target}:model", "differentiate", "--plan", "dp=2,zero=3").stdout
    assert any(line.startswith("-") and "aten.linear" in line for line in first.splitlines())
    captured = _run("graph", f"{target}:model", "--level", "forward", "--plan", "passes=differentiate").stdout
    assert "aten.linear" in captured
    before = _run("graph", f"{target}:model", "--after", "canonicalize", "--plan", "dp=2,zero=3").stdout
    assert "aten.linear" in before and "all_gather" not in before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memory", "{}:modle"], ["no factory 'modle'", "'model'"]),
        (["memory", "{}"], ["names no factory"]),
        (["memory", "nowhere.py:model"], ["no file nowhere.py"]),
        (["memory", "no_such_module:model"], ["cannot be imported"]),
        (["memory", "{}:broken"], ["raised ValueError: no weights today"]),
        (["memory", "{}:nothing"], ["returned a int"]),
        (["memory", "{}:wordy"], ["raised ValueError: first second"]),
        (["memory", "{}:misfit"], ["Linear.forward", "missing a required argument: 'input'"]),
        (["memory", "{}:narrow"], ["could not be captured", "reduction dim"]),
        (["memory", "{}:model", "--plan", "passes=canonicalize"], ["without gradients", "add differentiate"]),
        (["check", "{}:model", "--plan", "dp=2,zero=3"], ["meta device"]),
        (["memory", "{}:model", "--plan", "zero=9"], ["zero.stage=9", "3"]),
        (["memory", "{}:model", "--plan", "dp=3", "--world", "4"], ["dp=4"]),
        (["graph", "{}:model", "--after", "zerro", "--plan", "dp=2,zero=3"], ["'zerro'", "'zero'"]),
        (["diff", "{}:model", "bukket", "--plan", "dp=2,zero=3"], ["'bukket'", "'bucket'"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(target: str, arguments: list[str], words: list[str]) -> None:
    found = _run(*(a.format(target) for a in arguments))
    assert found.returncode == 2
    assert len(found.stderr.strip().splitlines()) == 1 and "Traceback" not in found.stderr
    assert all(word in found.stderr for word in words), found.stderr
