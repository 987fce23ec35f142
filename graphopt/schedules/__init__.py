"""Pipeline schedules as data: the published ones, others by search, when each action runs, what ranks exchange."""

from graphopt.schedules.actions import Action, Schedule, Work, check
from graphopt.schedules.exchange import Compute, Receive, Send, Step, steps
from graphopt.schedules.timeline import StageTimes, Timeline, simulate

__all__ = [
    "Action",
    "Compute",
    "Receive",
    "Schedule",
    "Send",
    "StageTimes",
    "Step",
    "Timeline",
    "Work",
    "check",
    "simulate",
    "steps",
]
