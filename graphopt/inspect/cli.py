"""``graphopt-inspect``: what a plan does to a model, with no process group and no memory for its parameters."""

import enum
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.syntax import Syntax

from graphopt.driver import lower
from graphopt.errors import GraphoptError
from graphopt.inspect.differential import check, verdict_table
from graphopt.inspect.recorder import Recorder
from graphopt.inspect.target import load_target
from graphopt.passes.pipeline import Observer
from graphopt.plan import Plan
from graphopt.report import Report, communication_table, memory_table, passes_table

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

Target = Annotated[
    str, typer.Argument(help="package.module:factory or file.py:factory, giving (model, example inputs)")
]
PlanOption = Annotated[str, typer.Option("--plan", help="plan text (dp=4,zero=3) or a .yaml, .json or .toml file")]
World = Annotated[int | None, typer.Option("--world", help="ranks; by default the product of the plan's mesh")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Evaluation = Annotated[bool, typer.Option("--eval", help="the program of evaluation, without gradients")]


class GraphLevel(enum.StrEnum):
    """Which graph to print when no pass is named."""

    FORWARD = "forward"
    STEP = "step"


@app.command()
def summary(
    target: Target, plan: PlanOption = "", world: World = None, as_json: Json = False, evaluation: Evaluation = False
) -> None:
    """Passes, communication and memory."""
    report = _compile(target, plan, world, evaluation)
    _show(report.to_dict(), as_json, report)


@app.command()
def passes(
    target: Target, plan: PlanOption = "", world: World = None, as_json: Json = False, evaluation: Evaluation = False
) -> None:
    """What each pass did, and how long it took."""
    report = _compile(target, plan, world, evaluation)
    _show(report.to_dict()["passes"], as_json, passes_table(report.passes))


@app.command()
def communication(
    target: Target, plan: PlanOption = "", world: World = None, as_json: Json = False, evaluation: Evaluation = False
) -> None:
    """Calls and bytes of each collective in a step."""
    found = _compile(target, plan, world, evaluation).communication
    _show(found.to_dict(), as_json, communication_table(found))


@app.command()
def memory(
    target: Target, plan: PlanOption = "", world: World = None, as_json: Json = False, evaluation: Evaluation = False
) -> None:
    """Bytes by category on one rank, and the peak."""
    found = _compile(target, plan, world, evaluation).memory
    _show(found.to_dict(), as_json, memory_table(found))


@app.command()
def graph(
    target: Target,
    plan: PlanOption = "",
    world: World = None,
    as_json: Json = False,
    evaluation: Evaluation = False,
    after: Annotated[str | None, typer.Option(help="the pass after which to print; by default the last")] = None,
    level: Annotated[GraphLevel, typer.Option(help="without --after: the last graph of this level")] = GraphLevel.STEP,
) -> None:
    """The graph after a pass."""
    recorder = _record(target, plan, world, evaluation)
    name = after or recorder.last(level.value)
    text = recorder.after(name)
    _show({"after": name, "graph": text.splitlines()}, as_json, Syntax(text, "python", word_wrap=False))


@app.command()
def diff(
    target: Target,
    pass_name: Annotated[str, typer.Argument(metavar="PASS", help="the pass whose change to print")],
    plan: PlanOption = "",
    world: World = None,
    as_json: Json = False,
    evaluation: Evaluation = False,
) -> None:
    """What a pass changed."""
    text = _record(target, plan, world, evaluation).difference(pass_name)
    _show({"pass": pass_name, "diff": text.splitlines()}, as_json, Syntax(text or "no change\n", "diff"))


@app.command()
def source(
    target: Target, plan: PlanOption = "", world: World = None, as_json: Json = False, evaluation: Evaluation = False
) -> None:
    """The emitted Python."""
    report = _compile(target, plan, world, evaluation)
    _show({"path": str(report.source_path), "source": report.source}, as_json, Syntax(report.source, "python"))


@app.command(name="check")
def differential_check(
    target: Target, plan: PlanOption = "", world: World = None, as_json: Json = False, evaluation: Evaluation = False
) -> None:
    """Run the program after each pass beside the model, on all ranks in this process; exit code 1 if one differs."""
    resolved = _plan(plan, world)
    model, args, kwargs = load_target(target)
    model.train(not evaluation)
    with torch.set_grad_enabled(not evaluation):
        verdict = check(model, args, kwargs, resolved)
    _show(verdict.to_dict(), as_json, verdict_table(verdict))
    if verdict.guilty is not None:
        raise typer.Exit(1)


def _record(target: str, plan_text: str, world: int | None, evaluation: bool) -> Recorder:
    """The program after every pass, as text: only where it is asked for, for large models print slowly."""
    recorder = Recorder()
    report = _compile(target, plan_text, world, evaluation, recorder.observe)
    recorder.keep_last(len(report.passes))
    return recorder


def _compile(
    target: str, plan_text: str, world: int | None, evaluation: bool, observer: Observer | None = None
) -> Report:
    resolved = _plan(plan_text, world)
    model, args, kwargs = load_target(target)
    model.train(not evaluation)
    with torch.set_grad_enabled(not evaluation):
        return lower(model, args, kwargs, resolved, observer=observer).report


def _plan(text: str, world: int | None) -> Plan:
    """The plan of a text or file, resolved for `world` ranks, or for those of its mesh."""
    plan = Plan.load(text) if Path(text).suffix in (".yaml", ".yml", ".json", ".toml") else Plan.parse(text)
    return plan.resolve(world if world is not None else max(1, _product(plan)))


def _product(plan: Plan) -> int:
    ranks = 1
    for size in plan.mesh.values():
        ranks *= size
    return ranks


def _show(values: Any, as_json: bool, rendered: Any) -> None:
    if as_json:
        print(json.dumps(values, indent=2))
    elif isinstance(rendered, Syntax) and not sys.stdout.isatty():
        print(rendered.code, end="")
    else:
        Console().print(rendered)


def _with_view(arguments: list[str]) -> list[str]:
    """The summary is the view where a target stands in place of one."""
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    is_target = bool(arguments) and ":" in arguments[0] and arguments[0] not in names
    return ["summary", *arguments] if is_target else arguments


def main() -> None:
    """Run the command line; an error of the user's is one line and exit code 2."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # it logs what is about to be raised
    try:
        app(_with_view(sys.argv[1:]))
    except GraphoptError as error:
        print(f"graphopt-inspect: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
