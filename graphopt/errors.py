"""Every error a user can meet. Each message says what, where, and the nearest valid choice."""


class GraphoptError(Exception):
    """The root of graphopt's own errors."""


class PlanError(GraphoptError, ValueError):
    """A plan that cannot be carried out: the message names field, value and the nearest valid choice."""


class CaptureError(GraphoptError):
    """A model that cannot be turned into a graph: the message names the model's source line and the remedy."""


class PassError(GraphoptError):
    """A pass that was misused (wrong level, missing requirement) or that failed."""


class VerificationError(GraphoptError):
    """A program that breaks a rule of its level; the message names the rule, the pass and the node."""


class RankMismatchError(GraphoptError, RuntimeError):
    """Ranks of one group hold different plans, models or programs; raised on every rank before any step."""


class RankLostError(GraphoptError):
    """Another rank has failed, has ended, or is silent, while this one waits for it."""


class OffloadError(GraphoptError):
    """What was put aside on disk could not be written or read; the message names tensor, file, cause and moment."""
