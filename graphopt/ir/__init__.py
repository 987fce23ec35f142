"""The graph types: programs with typed roles, facts about nodes, effects and layouts."""

from graphopt.ir.effects import Effect, effect_of, is_view
from graphopt.ir.facts import NodeFacts, Phase, annotate, explain, facts_of
from graphopt.ir.layout import ParameterLayout, Split
from graphopt.ir.program import Level, Program
from graphopt.ir.roles import Input, InputKind, Output, OutputKind

__all__ = [
    "Effect",
    "Input",
    "InputKind",
    "Level",
    "NodeFacts",
    "Output",
    "OutputKind",
    "ParameterLayout",
    "Phase",
    "Program",
    "Split",
    "annotate",
    "effect_of",
    "explain",
    "facts_of",
    "is_view",
]
