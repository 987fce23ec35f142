"""A rank's part of a pipeline schedule, carried out."""

from collections.abc import Mapping, Sequence

import torch

from graphopt.errors import RankMismatchError
from graphopt.runtime.alarm import Alarm
from graphopt.runtime.messages import TensorSpec
from graphopt.runtime.peers import Peers
from graphopt.runtime.pending import Finish
from graphopt.runtime.stages import Stage
from graphopt.schedules.actions import Action, Work
from graphopt.schedules.exchange import Compute, Receive, Send, Step

_NAMES = {
    Work.FORWARD: "forward",
    Work.BACKWARD: "backward",
    Work.INPUT_GRADIENT: "gradients of inputs",
    Work.WEIGHT_GRADIENT: "gradients of weights",
}


def run(
    steps: Sequence[Step],
    stages: Mapping[int, Stage],
    rank_of_stage: Sequence[int],
    peers: Peers,
    alarm: Alarm,
) -> None:
    """Carry out `steps`, those of this rank, on its stages.

    All ranks call this together, each with its own. What a stage raises is raised again here, with a note that names
    the step; the others raise an error that quotes it. Raises RankLostError if another rank has ended,
    RankMismatchError if a stage gives, or is sent, something else than it says. After any error `peers` are closed.
    """
    execution = _Execution(stages, rank_of_stage, peers)
    try:
        for step in steps:
            with alarm.watching(_moment(step), Exception):
                execution.do(step)
        with alarm.watching("the end of a step of the pipeline", Exception):
            peers.flush()
    except BaseException:
        peers.close()
        raise


def _moment(step: Step) -> str:
    """What is done, for messages."""
    match step:
        case Compute(Action(stage, work, microbatch)):
            return f"stage {stage}, {_NAMES[work]} of microbatch {microbatch}"
        case Send(stage, other, microbatch, gradient) | Receive(stage, other, microbatch, gradient):
            verb = "send to" if isinstance(step, Send) else "receive from"
            what = "gradients" if gradient else "values"
            return f"stage {stage}, to {verb} stage {other} the {what} of microbatch {microbatch}"


class _Execution:
    """What is on its way between stages: each value is let go when it is sent or read."""

    def __init__(self, stages: Mapping[int, Stage], rank_of_stage: Sequence[int], peers: Peers) -> None:
        self._stages = stages
        self._rank_of_stage = rank_of_stage
        self._last = len(rank_of_stage) - 1
        self._peers = peers
        self._outgoing: dict[tuple[int, int, bool], list[torch.Tensor]] = {}  # by the stage that gives it
        self._incoming: dict[tuple[int, int, bool], Finish] = {}  # by the stage that reads it

    def do(self, step: Step) -> None:
        match step:
            case Compute(action):
                self._compute(action)
            case Send(stage, other, microbatch, gradient):
                self._peers.send(self._rank_of_stage[other], self._outgoing.pop((stage, microbatch, gradient)))
            case Receive(stage, other, microbatch, gradient):
                specs = _specs(self._stages[stage], microbatch, gradient, behind=gradient)
                source = self._rank_of_stage[other]
                self._incoming[stage, microbatch, gradient] = self._peers.receive(source, specs)

    def _compute(self, action: Action) -> None:
        stage, index, microbatch = self._stages[action.stage], action.stage, action.microbatch
        match action.work:
            case Work.FORWARD:
                self._give(index, microbatch, stage.forward(microbatch, self._received(index, microbatch)))
            case Work.BACKWARD:
                self._give_back(index, microbatch, stage.backward(microbatch, self._gradients(index, microbatch)))
            case Work.INPUT_GRADIENT:
                given = stage.input_gradients(microbatch, self._gradients(index, microbatch))
                self._give_back(index, microbatch, given)
            case Work.WEIGHT_GRADIENT:
                stage.weight_gradients(microbatch)

    def _received(self, stage: int, microbatch: int) -> list[torch.Tensor]:
        """What the stage before gave."""
        return self._incoming.pop((stage, microbatch, False))() if stage else []

    def _gradients(self, stage: int, microbatch: int) -> list[torch.Tensor | None]:
        """Of what the stage has given on, None where there is none."""
        if stage == self._last:
            return []
        arrived = iter(self._incoming.pop((stage, microbatch, True))())
        return [next(arrived) if has else None for has in self._stages[stage].outgoing_gradients(microbatch)]

    def _give(self, stage: int, microbatch: int, values: Sequence[torch.Tensor]) -> None:
        if stage < self._last:
            self._pass(stage, stage + 1, microbatch, values, gradient=False)

    def _give_back(self, stage: int, microbatch: int, gradients: Sequence[torch.Tensor | None]) -> None:
        if stage:
            travel = zip(gradients, self._stages[stage].incoming_gradients(microbatch), strict=True)
            self._pass(stage, stage - 1, microbatch, [each for each, has in travel if has], gradient=True)

    def _pass(
        self, stage: int, other: int, microbatch: int, tensors: Sequence[torch.Tensor | None], gradient: bool
    ) -> None:
        """Hand over to a stage on this rank, or keep until it is sent."""
        specs = _specs(self._stages[stage], microbatch, gradient, behind=not gradient)
        given = _as_said(stage, microbatch, tensors, specs, "gradient" if gradient else "value")
        if other in self._stages:
            arrived = [tensor.contiguous() for tensor in given]  # as what comes in a message is
            self._incoming[other, microbatch, gradient] = lambda: arrived
        else:
            self._outgoing[stage, microbatch, gradient] = given


def _specs(stage: Stage, microbatch: int, gradient: bool, behind: bool) -> list[TensorSpec]:
    """Of the values that cross behind a stage, or before it, or of those of their gradients that there are."""
    values = stage.outgoing(microbatch) if behind else stage.incoming(microbatch)
    if not gradient:
        return list(values)
    travel = stage.outgoing_gradients(microbatch) if behind else stage.incoming_gradients(microbatch)
    return [spec for spec, has in zip(values, travel, strict=True) if has]


def _as_said(
    stage: int, microbatch: int, tensors: Sequence[torch.Tensor | None], specs: Sequence[TensorSpec], what: str
) -> list[torch.Tensor]:
    """Those tensors; the other side takes them to be of those specs. Raises RankMismatchError if they are not."""
    found = ["none" if tensor is None else str(TensorSpec.of(tensor)) for tensor in tensors]
    said = [str(spec) for spec in specs]
    if found != said:
        raise RankMismatchError(
            f"stage {stage} gives {what}s {', '.join(found) or 'none'} of microbatch {microbatch} "
            f"where it says {', '.join(said) or 'none'}"
        )
    return [tensor for tensor in tensors if tensor is not None]
