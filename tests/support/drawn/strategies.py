"""Which examples hypothesis draws."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from hypothesis import strategies as st

from graphopt import Offload, Plan, Precision, Remat, Zero
from graphopt.errors import PassError
from graphopt.ir import Level
from graphopt.ir.copies import PLACES
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass
from graphopt.passes.pipeline import Pipeline
from graphopt.passes.rematerialize import Rematerialize
from tests.support.drawn.example import Example, Layer
from tests.support.drawn.snippets import ENDINGS, LAYERS

SIZES = (1, 2, 3, 5, 7, 8)
_OPTIONS: Mapping[str, st.SearchStrategy[object]] = {
    "stage": st.sampled_from([0, 1, 2, 3]),
    "keep": st.sampled_from(["", "*", "blocks.0.*", "head*|*.p0"]),
    "bytes": st.sampled_from([0, 1, 64, 1 << 20]),
    "prefetch": st.integers(0, 3),
    "policy": st.sampled_from(["full", "selective"]),
    "share": st.sampled_from([0.9, 0.7, 0.5, 0.2]),  # which some examples have room for and others have not
    "place": st.sampled_from(PLACES),
    "least_bytes": st.sampled_from([0, 0, 64]),
    "depth": st.integers(1, 3),
}
_OF_A_BUDGET = {"share", "place", "least_bytes"}

_often = st.sampled_from([True, False, False, False])


def _layers(kinds: Sequence[str], random: bool) -> st.SearchStrategy[Layer]:
    return st.builds(
        Layer,
        kind=st.sampled_from([kind for kind in kinds if random or not LAYERS[kind].random]),
        size=st.sampled_from(SIZES),
        repeat=st.sampled_from([1, 1, 1, 2, 3]),
        frozen=_often,
        tied=st.booleans(),
        again=_often,
    )


zeros = st.builds(
    Zero,
    stage=st.integers(0, 3),
    bucket_bytes=st.sampled_from([None, 1, 256, 4096]),
    prefetch=st.integers(0, 3),
    whole_below=st.sampled_from([0, 32, 4096]),
    keep_gathered=st.sampled_from([False, True, ("blocks.0.*",), ("*.p*", "head.*")]),
)
offloads = st.one_of(
    st.none(),
    st.none(),
    st.builds(
        Offload,
        place=st.sampled_from(PLACES),
        least_bytes=_OPTIONS["least_bytes"],
        activations=st.booleans(),
        state=st.booleans(),
    ),
)
budgets = st.one_of(st.none(), st.none(), st.builds(Remat, _OPTIONS["share"]))
precisions = st.one_of(st.none(), st.none(), st.builds(Precision, reduce=st.sampled_from(["fp32", "bf16"])))


def pipelines(needed: Sequence[str], others: Sequence[str]) -> st.SearchStrategy[str]:
    """Text of pipelines that the contracts of their passes allow: of all that are needed, and of some others."""
    wanted = st.tuples(*(_steps(REGISTRY[name]) for name in needed)).map(list)
    others = st.lists(st.sampled_from(others).flatmap(lambda name: _steps(REGISTRY[name])), max_size=5)
    steps = st.builds(list.__add__, wanted, others).flatmap(st.permutations)
    return steps.map(_ordered).filter(lambda kept: {*needed} <= {step.name for step in kept}).map(_text)


def _steps(kind: type[Pass]) -> st.SearchStrategy[Pass]:
    names = {spec.name for spec in dataclasses.fields(kind.Options)} & _OPTIONS.keys()
    if kind is not Rematerialize:
        return _built(kind, names)
    names.discard("bytes")
    return st.one_of(_built(kind, names - _OF_A_BUDGET), _built(kind, names - {"policy"}, policy=st.just("budget")))


def _built(kind: type[Pass], names: Collection[str], **more: st.SearchStrategy[object]) -> st.SearchStrategy[Pass]:
    options = {name: _OPTIONS[name] for name in sorted(names)}
    return st.builds(kind, st.builds(kind.Options, **options, **more))


def _ordered(steps: list[Pass]) -> list[Pass]:
    """Again and again the first of the passes that may run now; those that never may are left out."""
    kept: list[Pass] = []
    while step := next((step for step in steps if _may_follow(kept, step)), None):
        kept.append(step)
        steps = [other for other in steps if other is not step]
    return kept


def _may_follow(kept: list[Pass], step: Pass) -> bool:
    try:
        Pipeline([*kept, step]).check(Level.FORWARD)
    except PassError:
        return False
    return True


def _text(steps: list[Pass]) -> str:
    return str(Pipeline(steps))


@st.composite
def examples(
    draw: st.DrawFn,
    ranks: Sequence[int] = (1, 2, 3, 4),
    random: bool = True,
    whole_batch: bool = True,
    most_layers: int = 5,
    kinds: Sequence[str] = tuple(LAYERS),
) -> Example:
    """A module, its call and its plan. kinds: of layers. random: whether dropout and the like are.
    whole_batch: whether ranks may take statistics together, so that each gives other outputs than eager on its part.
    """
    layers = tuple(draw(st.lists(_layers(kinds, random), min_size=1, max_size=most_layers)))
    # Capture refuses to assign a buffer that several blocks have.
    assigns = any(layer.kind == "running mean, assigned" for layer in layers)
    example = Example(
        width=draw(st.sampled_from(SIZES)),
        layers=layers,
        depth=draw(st.sampled_from([1, 1, 2, 3])),
        shared=draw(st.sampled_from(["nothing", "weights"] if assigns else ["nothing", "weights", "everything"])),
        ending=draw(st.sampled_from(sorted(ENDINGS))),
        rows=draw(st.sampled_from([1, 2, 3, 4, 0])),
        leaf=draw(st.booleans()),
        ranks=draw(st.sampled_from(ranks)),
        plan=Plan(),
        more_rows=draw(st.sampled_from([0, 0, 0, 2])),
    )
    precision = draw(precisions)
    needed = (
        ["canonicalize", "differentiate"] + ["precision"] * (precision is not None) + ["zero"] * (example.ranks > 1)
    )
    may_synchronize = whole_batch and example.is_mean_of_rows
    fitting = {
        "rematerialize": example.has_repeated_layers,
        "synchronize_batch_norm": may_synchronize,
        "split": False,  # over another axis of the mesh than that of the batch
        "cut": False,  # leaves a part of the model
    }
    others = [name for name in REGISTRY if fitting.get(name, True)]
    plan = Plan(
        mesh={"dp": example.ranks},
        zero=draw(zeros),
        precision=precision,
        remat=draw(budgets),
        offload=draw(offloads),
        dynamic=draw(st.sampled_from([None, None, "batch"])),
        passes=draw(st.one_of(st.none(), pipelines(needed, others))),
        batch_norm=draw(st.sampled_from(["local", "global"])) if may_synchronize else "local",
        transport=draw(st.sampled_from(["auto", "group"])),
    )
    return dataclasses.replace(example, plan=plan)
