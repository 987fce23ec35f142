"""These tests are about capture, so here every call is captured."""

import pytest

import graphopt.lowering.call
from graphopt.capture.export import capture


@pytest.fixture(autouse=True)
def _captured_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphopt.lowering.call, "capture", capture)
