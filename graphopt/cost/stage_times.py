"""How long a stage of a pipeline takes for a microbatch, from its programs."""

from collections.abc import Mapping

from graphopt.cost.hardware import Hardware
from graphopt.cost.simulator import simulate
from graphopt.ir import Program
from graphopt.schedules import StageTimes, Work


def stage_times(programs: Mapping[Work, Program], mesh: Mapping[str, int], hardware: Hardware) -> StageTimes:
    """Seconds of the forward and of each half of the backward; zero for what there is no program for.

    programs: for each work; the halves of a backward that is whole count the same. mesh: axis -> ranks.
    """
    seconds = {work: simulate(program, mesh, hardware).total_seconds for work, program in programs.items()}
    half = seconds.get(Work.BACKWARD, 0.0) / 2
    return StageTimes(
        seconds[Work.FORWARD], seconds.get(Work.INPUT_GRADIENT, half), seconds.get(Work.WEIGHT_GRADIENT, half)
    )
