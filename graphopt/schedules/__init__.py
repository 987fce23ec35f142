"""Pipeline schedules as data: the published ones, others by search, when each action runs, what ranks exchange."""

from graphopt.schedules.actions import Action, Schedule, Work, check, forwards
from graphopt.schedules.bounds import live_bound, peak_live
from graphopt.schedules.exchange import Compute, Receive, Send, Step, steps
from graphopt.schedules.published import NAMES, published
from graphopt.schedules.search import search
from graphopt.schedules.timeline import StageTimes, Timeline, simulate

__all__ = [
    "NAMES",
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
    "forwards",
    "live_bound",
    "peak_live",
    "published",
    "search",
    "simulate",
    "steps",
]
