"""A mixture of experts as plain modules: of many feed-forward networks each token goes through a few."""

from graphopt.experts.block import Experts
from graphopt.experts.feed_forward import ACTIVATIONS, FeedForward
from graphopt.experts.losses import load_balancing_loss, router_z_loss
from graphopt.experts.router import PRIORITIES, SCORES, Router, Routing

__all__ = [
    "ACTIVATIONS",
    "PRIORITIES",
    "SCORES",
    "Experts",
    "FeedForward",
    "Router",
    "Routing",
    "load_balancing_loss",
    "router_z_loss",
]
