"""Fixtures: shared gloo ranks, and profiles for property tests."""

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

import tests.support.preloaded  # noqa: F401
from tests.support import captures
from tests.support.ranks import Ranks

# A change is judged by the same examples each time; new ones are the nightly run's.
hypothesis.settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(world)``: running ranks; a set that failed is replaced by a fresh one."""
    pools: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in pools or not pools[world].is_alive:
            pools[world] = Ranks(world)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session", autouse=True)
def _captured_once() -> Iterator[None]:
    with captures.captured_once():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
