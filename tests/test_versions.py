"""Versions are told also where graphopt is not installed."""

from importlib import metadata

import pytest
import torch

from graphopt.versions import versions


def test_a_checkout_that_is_not_installed_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    assert versions()["graphopt"] == "1.2.3" and versions()["torch"] == torch.__version__
    monkeypatch.setattr(metadata, "version", missing)
    assert versions()["graphopt"] == "not installed"
