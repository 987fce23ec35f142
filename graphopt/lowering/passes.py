"""The passes that a plan stands for, as text and as a pipeline."""

import dataclasses
from collections.abc import Mapping

from graphopt.errors import PassError, PlanError
from graphopt.ir import Level
from graphopt.lowering.schedule import live_counts, planned_schedule
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass
from graphopt.passes.cut import Cut
from graphopt.passes.pipeline import Pipeline
from graphopt.plan import Offload, Plan, Remat
from graphopt.triton_kernels.choice import asked

_SPLIT_AXES = {"sp": "heads", "cp": "sequence", "ep": "experts", "tp": "weights"}  # along what


def pipeline_text(plan: Plan, likely: Mapping[str, str] | None = None) -> str:
    """The textual pipeline that a resolved plan stands for.

    likely: patterns of modules -> how the model's author would split them.
    """
    if plan.passes is not None:
        return plan.passes
    ranks = plan.data_parallel_ranks
    steps = ["canonicalize", "state_causal"]
    if plan.batch_norm == "global" and ranks > 1:
        steps.append("synchronize_batch_norm")
    steps += [_split_text(plan, axis, likely or {}) for axis in plan.model_axes]
    is_chunked = bool(plan.model_axes) and plan.tensor.chunks > 1
    if is_chunked:
        steps.append(f"chunk{{chunks={plan.tensor.chunks}}}")
    if plan.pipeline_ranks > 1:
        steps.append(_cut_text(plan))
    if asked(plan.kernels) != "off":
        steps.append("fuse")
    steps.append("differentiate")
    if plan.precision is not None:
        steps.append("precision")
    steps.append("checkpoint")
    if plan.remat is not None:
        steps.append(_remat_text(plan.remat, plan.offload))
    offload = plan.offload
    if offload is not None and offload.activations and (plan.remat is None or plan.remat.budget is None):
        steps.append(f"offload{{{_place_text(offload)}}}")
    if is_chunked:
        steps.append("interleave")
    if ranks > 1:
        steps.append(_zero_text(plan))
    if ranks > 1 or plan.model_axes:
        steps.append(f"bucket{{bytes={plan.zero.bucket_bytes or 0}}}")
        steps.append(f"schedule{{prefetch={plan.zero.prefetch}}}")
    if offload is not None and offload.state:
        steps.append(f"offload_state{{{_place_text(offload)}}}")
    if offload is not None:
        steps.append("overlap")
    return ",".join(steps)


def kernels_of(plan: Plan) -> str:
    """How operators with kernels are computed, those also that the model calls or a pipeline of its own puts in."""
    return asked(plan.kernels if plan.kernels != "off" else "auto")


def planned_pipeline(
    plan: Plan,
    registry: Mapping[str, type[Pass]] = REGISTRY,
    likely: Mapping[str, str] | None = None,
    stage: int = 0,
) -> Pipeline:
    """The passes of a resolved plan that lead to a stage, if it is cut into several; likely: as in `pipeline_text`.

    Raises PassError if they cannot run, or do not lead to the step it asks for, PlanError for sizes that stay symbolic
    in a pipeline, whose messages have sizes that both sides know.
    """
    if plan.pipeline_ranks > 1 and plan.dynamic is not None:
        raise PlanError(f"dynamic={plan.dynamic} does not go with pp: a step compiles each shape of its microbatches")
    parsed = Pipeline.parse(pipeline_text(plan, likely), registry)
    pipeline = Pipeline([_told(step, stage) for step in parsed.passes])
    if pipeline.check(Level.FORWARD) is not Level.STEP:
        raise PassError(f"the pipeline {str(pipeline)!r} leaves a program without gradients; add differentiate to it")
    names = {step.name for step in pipeline.passes}
    if plan.precision is not None and "precision" not in names:
        raise PassError(
            f"the pipeline {str(pipeline)!r} leaves parameters as they are stored, where the plan computes in "
            f"{plan.precision.compute}; add precision behind differentiate"
        )
    if plan.data_parallel_ranks > 1 and "zero" not in names:
        raise PassError(f"the pipeline {str(pipeline)!r} leaves each rank its own gradients; add zero to it")
    if plan.pipeline_ranks > 1 and "cut" not in names:
        raise PassError(f"the pipeline {str(pipeline)!r} leaves each rank all layers; add cut before differentiate")
    if plan.model_axes and "split" not in names:
        axis = plan.model_axes[0]
        raise PassError(f"the pipeline {str(pipeline)!r} splits nothing over {axis}; add split{{axis={axis}}} to it")
    return pipeline


def _told(step: Pass, stage: int) -> Pass:
    """A pass; if it is the one that cuts, told which stage to leave."""
    return Cut(dataclasses.replace(step.options, stage=stage)) if isinstance(step, Cut) else step


def _cut_text(plan: Plan) -> str:
    schedule, asked = planned_schedule(plan), plan.pipeline
    options = [f"stages={schedule.stages}"]
    options += [f"at={'|'.join(asked.cuts)}"] if asked.cuts else []
    if asked.memory is not None:
        on_a_rank = schedule.stages // schedule.ranks
        options += [f"live={'|'.join(map(str, live_counts(plan)))}", f"memory_bytes={asked.memory // on_a_rank}"]
    options += [f"send_bytes={asked.send}"] if asked.send is not None else []
    return f"cut{{{','.join(options)}}}"


def _place_text(offload: Offload) -> str:
    return f"place={offload.place},least_bytes={offload.least_bytes}"


def _remat_text(remat: Remat, offload: Offload | None) -> str:
    if remat.budget is None:
        options = [f"policy={remat.policy}"]
    else:
        name = "bytes" if isinstance(remat.budget, int) else "share"
        options = ["policy=budget", f"{name}={remat.budget}"]
        options += [_place_text(offload)] if offload is not None and offload.activations else []
    options += [
        f"{name}={'|'.join(kept)}" for name, kept in (("keep", remat.keep), ("keep_ops", remat.keep_ops)) if kept
    ]
    return f"rematerialize{{{','.join(options)}}}"


def _split_text(plan: Plan, axis: str, likely: Mapping[str, str]) -> str:
    options = [f"axis={axis}"]
    if _SPLIT_AXES[axis] != "weights":
        options.append(f"along={_SPLIT_AXES[axis]}")
        if _SPLIT_AXES[axis] == "experts" and plan.dispatch.capacity is not None:
            options.append(f"capacity={plan.dispatch.capacity}")
    else:
        options += ["sequence=true"] if plan.tensor.sequence else []
        options += _styles_text(plan.tensor.patterns, "")
        options += _styles_text(likely, "likely_") if plan.tensor.use_model_plan else []
    options += [] if plan.tensor.gather_outputs else ["gather_outputs=false"]
    return f"split{{{','.join(options)}}}"


def _styles_text(patterns: Mapping[str, str], prefix: str) -> list[str]:
    styles: dict[str, list[str]] = {}
    for pattern, style in patterns.items():
        styles.setdefault(style, []).append(pattern)
    return [f"{prefix}{style}={'|'.join(found)}" for style, found in styles.items()]


def _zero_text(plan: Plan) -> str:
    kept = plan.zero.keep_gathered
    patterns = "*" if kept is True else "|".join(kept or ())
    stage = 2 if plan.gathers_once_a_step else plan.zero.stage  # what is gathered outlasts a microbatch
    return f"zero{{stage={stage}" + (f",keep={patterns}" if patterns else "") + "}"
