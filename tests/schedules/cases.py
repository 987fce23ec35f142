"""Schedules that several tests ask."""

from hypothesis import assume
from hypothesis import strategies as st

from graphopt.errors import PlanError
from graphopt.schedules import NAMES, Schedule, published


@st.composite
def published_schedules(draw: st.DrawFn, most_ranks: int = 6, most_microbatches: int = 16) -> Schedule:
    """Any published schedule with numbers that it has a form for."""
    name, ranks = draw(st.sampled_from(NAMES)), draw(st.integers(1, most_ranks))
    microbatches, stages = draw(st.integers(1, most_microbatches)), draw(st.none() | st.integers(1, 3))
    try:
        return published(name, ranks, microbatches, stages)
    except PlanError:
        assume(False)
        raise
