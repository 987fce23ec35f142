"""Every call of the zoo's forward programs has a signature, and keeps to it."""

import pytest

from tests.support.forward import forward_program
from tests.support.parts import check_program
from tests.support.zoo import CONVNET, WITH_DROPOUT, ZOO

ENTRIES = {**ZOO, "convnet": CONVNET, "dropout": WITH_DROPOUT["gpt2"]}


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Calls that a model before has had too."""
    return set()


@pytest.mark.parametrize("name", ENTRIES)
def test_parts_joined_are_the_whole(name: str, seen: set[str]) -> None:
    check_program(forward_program(ENTRIES[name]), seen)
