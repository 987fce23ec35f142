"""What is installed in a model: its calls, and the steps of a pipeline."""

from graphopt.engines.engine import Engine, Specialization
from graphopt.engines.pipelined import PipelinedEngine, engine_of

__all__ = ["Engine", "PipelinedEngine", "Specialization", "engine_of"]
