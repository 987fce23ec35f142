"""A reproducer run once more: fails as recorded, fails otherwise, or passes now."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from graphopt.errors import GraphoptError
from graphopt.inspect.replay import replay, replay_command
from graphopt.ir import Program
from graphopt.passes import PassContext
from tests.passes.test_reproducer import PLAN, Breaks, Raises, failed, folder_of


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_ARTIFACTS", str(tmp_path))


def test_a_failure_happens_again() -> None:
    found = replay(folder_of(failed(PLAN.format("raises"))))
    assert found.exit_code == 1 and found.is_as_recorded and found.failed == "raises"
    first, second = str(found).splitlines()
    assert first.startswith("raises fails as recorded: PassError: raises failed: KeyError: 'no such layer")
    assert second.endswith("(run)") and f"{Path(__file__).parents[1] / 'passes' / 'test_reproducer.py'}:" in second


def test_a_refusal_happens_again_with_its_surroundings() -> None:
    found = replay(folder_of(failed(PLAN.format("breaks"))))
    assert found.exit_code == 1 and found.is_as_recorded and found.where is None
    first, *around = str(found).splitlines()
    assert first.startswith("breaks fails as recorded: VerificationError: after breaks: tanh is stated to be float64")
    assert any(line.startswith("> tanh") for line in around)


def test_a_pass_that_was_mended_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(failed(PLAN.format("raises")))
    monkeypatch.setattr(Raises, "run", lambda self, program, context: False)
    found = replay(folder)
    assert found.exit_code == 0 and found.error is None
    assert str(found).startswith("raises,zero,bucket passes now; recorded was PassError: raises failed: KeyError")


def test_another_failure_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(failed(PLAN.format("raises")))

    def run(self: Raises, program: Program, context: PassContext) -> bool:
        raise ValueError("something else")

    monkeypatch.setattr(Raises, "run", run)
    found = replay(folder)
    assert found.exit_code == 1 and not found.is_as_recorded
    assert str(found).startswith("raises fails, but not as recorded (PassError: raises failed: KeyError")
    monkeypatch.setattr(Raises, "run", Breaks.run)
    assert replay(folder).failed == "raises"
    monkeypatch.setattr(Raises, "run", lambda self, program, context: True)
    assert "it says that it changed something" in str(replay(folder))


def test_a_pass_further_on_may_be_the_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(failed(PLAN.format("raises").replace("bucket", "bucket,breaks,schedule")))
    monkeypatch.setattr(Raises, "run", lambda self, program, context: False)
    assert replay(folder).failed == "breaks"


def test_a_pass_that_is_gone_is_told_the_nearest() -> None:
    folder = folder_of(failed(PLAN.format("raises")))
    path = folder / "reproducer.json"
    path.write_text(path.read_text().replace("bucket", "bukket"))
    with pytest.raises(GraphoptError, match=r"'bukket' was .*; the nearest is 'bucket'"):
        replay(folder)


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(replay_command)
    folder = folder_of(failed(PLAN.format("raises")))
    shown = CliRunner().invoke(app, [str(folder)])
    assert shown.exit_code == 1 and shown.output.startswith("raises fails as recorded")
    values = json.loads(CliRunner().invoke(app, [str(folder), "--format", "json"]).output)
    assert values["failed"] == "raises" and values["as_recorded"] and values["recorded"]["versions"]["torch"]
    told = CliRunner().invoke(app, [str(folder), "--output", str(tmp_path / "told.txt")])
    assert told.exit_code == 1 and (tmp_path / "told.txt").read_text().startswith("raises fails as recorded")
    refused = CliRunner().invoke(app, [str(folder), "--format", "dot"])
    assert refused.exit_code == 2 and "'text', 'json'" in refused.output
