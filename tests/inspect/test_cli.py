"""The command line: every view in every form, and one line for every mistake."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graphopt.inspect.cli import main
from graphopt.passes.bucket import Bucket

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


@dataclass
class Ran:
    """What a command line printed, and how it ended."""

    returncode: int
    stdout: str
    stderr: str


def _run(*arguments: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return Ran(ended.value.code or 0, out.getvalue(), err.getvalue())  # type: ignore[arg-type]


def _values(*arguments: str) -> Any:
    found = _run(*arguments, "--format", "json")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


VIEWS = {
    "summary": [],
    "passes": [],
    "communication": [],
    "kernels": [],
    "memory": [],
    "schedule": [],
    "graph": [],
    "source": [],
    "diff": ["zero"],
    "why": ["output_node_name"],
    "compare": ["--against", "dp=1024,zero=1"],
}


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_in_every_form(target: str, view: str, tmp_path: Path) -> None:
    arguments = [view, f"{target}:model", *VIEWS[view], "--plan", "dp=1024,zero=3"]
    arguments = ["mm" if argument == "output_node_name" else argument for argument in arguments]
    text = _run(*arguments)
    assert text.returncode == 0 and text.stdout.strip(), text.stderr
    assert _values(*arguments)
    drawn = _run(*arguments, "--format", "dot")
    assert drawn.returncode == 0 and drawn.stdout.startswith("digraph {"), drawn.stderr
    page = tmp_path / "page.html"
    written = _run(*arguments, "--format", "html", "--output", str(page))
    assert written.returncode == 0 and page.read_text().lstrip().lower().startswith("<!doctype html>"), written.stderr


def test_the_command_is_installed_and_ends_as_its_line_says(target: str) -> None:
    command = [sys.executable, "-m", "graphopt.inspect.cli"]
    good = subprocess.run([*command, "passes", f"{target}:model"], capture_output=True, text=True, timeout=120)
    assert good.returncode == 0 and "differentiate" in good.stdout and not good.stderr
    bad = subprocess.run([*command, "passes", f"{target}:broken"], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1


def test_a_program_runs_on_its_own(target: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    plan = ["--plan", "dp=2,zero=3,zero.whole_below=0"]
    assert _run("source", f"{target}:real", *plan, "--standalone", "-o", str(path)).returncode == 0
    ran = subprocess.run([sys.executable, "-I", str(path)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0 and "gradient 0.weight" in ran.stdout, ran.stderr


def test_a_failed_pass_is_run_again_from_its_folder(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHOPT_ARTIFACTS", str(tmp_path))
    monkeypatch.setattr(Bucket, "run", lambda *_: 1 / 0)
    failed = _run("memory", f"{target}:model", "--plan", "dp=4,zero=3")
    assert (
        failed.returncode == 2
        and failed.stderr.count("\n") == 1
        and "bucket failed: ZeroDivisionError" in failed.stderr
    )
    (folder,) = tmp_path.glob("reproducer_*")
    assert failed.stderr.rstrip().endswith(f"graphopt-inspect replay {folder}")
    again = _run("replay", str(folder))
    assert again.returncode == 1 and "ZeroDivisionError" in again.stdout
    monkeypatch.undo()
    assert _run("replay", str(folder)).returncode == 0, "the pass works now"


def test_a_trace_is_written_for_perfetto(target: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert _run("schedule", f"{target}:model", "--plan", "dp=4,zero=3", "--trace", str(path)).returncode == 0
    assert {event["ph"] for event in json.loads(path.read_text())["traceEvents"]} == {"M", "X"}


def test_a_check_compares_every_pass(target: str) -> None:
    plan = ["--plan", "dp=2,zero=3,zero.whole_below=0"]
    shown = _run("check", f"{target}:real", *plan)
    assert shown.returncode == 0 and shown.stdout.count("agrees") == 8, shown.stderr
    values = _values("check", f"{target}:real", *plan)
    assert values["guilty"] is None and [each["worst"] for each in values["passes"]] == [0.0] * 8


def test_bytes_on_many_ranks(target: str) -> None:
    found = _values("communication", f"{target}:model", "--plan", "dp=256,zero=3")
    whole = 4 * 512 * 512 * 4
    gathers = [row["bytes"] for row in found["collectives"] if row["collective"] == "all-gather"]
    # The first layer's input wants no gradient, so its weight is not gathered for backward.
    assert gathers == [pytest.approx((2 - 1 / 4) * whole * 255 / 256)]


def test_a_target_alone_gives_the_summary(target: str) -> None:
    given = [f"{target}:model", "--plan", "dp=4,zero=3"]
    alone, named = (_values(*view, *given) for view in ([], ["summary"]))
    assert alone.keys() == named.keys() and alone["communication"] == named["communication"]


def test_a_graph_is_that_of_the_compilation_that_counts(target: str) -> None:
    """Of two compilations of one call, the second has the gradients."""
    nodes = _values("graph", f"{target}:two_outputs", "--after", "differentiate")["nodes"]
    (gradient,) = (node for node in nodes if node["target"] == "output (gradient linear.weight)")
    assert gradient["arguments"] != "None"


def test_a_view_that_does_not_exist_is_told_the_nearest(target: str) -> None:
    found = _run("memry", f"{target}:model")
    assert found.returncode == 2 and "memory" in found.stderr and "Traceback" not in found.stderr


def test_a_difference_and_a_graph_in_between(target: str) -> None:
    changed = _run("diff", f"{target}:model", "schedule", "--plan", "dp=2,zero=3").stdout
    assert "> all_gather" in changed and "# moved, now after" in changed
    first = _run("diff", f"{target}:model", "differentiate", "--plan", "dp=2,zero=3").stdout
    assert any(line.startswith("- linear") and "in its place" in line for line in first.splitlines())
    unfolded = ["--unfold", "*"]
    plan = ["--plan", "passes=canonicalize,differentiate"]
    captured = _run("graph", f"{target}:model", "--level", "forward", *plan, *unfolded)
    assert "aten.linear" in captured.stdout
    before = _run("graph", f"{target}:model", "--after", "canonicalize", "--plan", "dp=2,zero=3", *unfolded).stdout
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
        (["why", "{}:model", "mmm_1", "--plan", "dp=2,zero=3"], ["no node 'mmm_1'", "'mm_1'"]),
        (["replay", "/no/such/folder"], ["no folder /no/such/folder"]),
        (["memory", "{}:model", "--hardware", "h100"], ["no hardware 'h100'", "'h100-sxm'"]),
        (["memory", "{}:model", "--format", "yaml"], ["'yaml'", "json"]),
        (["memory", "{}:model", "--against", "dp=2"], ["--against"]),
        (["compare", "{}:model"], ["--against"]),
        (["memory", "{}:model", "-o", "no/such/folder/x"], ["no/such/folder/x cannot be written"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(target: str, arguments: list[str], words: list[str]) -> None:
    found = _run(*(a.format(target) for a in arguments))
    assert found.returncode == 2
    assert len(found.stderr.strip().splitlines()) == 1 and "Traceback" not in found.stderr
    assert all(word in found.stderr for word in words), found.stderr
