"""Every call of further architectures' forward programs has a signature, and keeps to it."""

import pytest

from tests.support.architectures import ARCHITECTURES
from tests.support.forward import forward_program
from tests.support.parts import check_program


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Calls that a model before has had too."""
    return set()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_joined_are_the_whole(name: str, seen: set[str]) -> None:
    check_program(forward_program(ARCHITECTURES[name]), seen)
