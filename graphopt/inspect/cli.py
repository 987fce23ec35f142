"""``graphopt-inspect``: what a plan does to a model, with no process group and no memory for its parameters."""

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from graphopt.errors import GraphoptError
from graphopt.inspect.differential import check as differential_check
from graphopt.inspect.replay import message_of, replay_command
from graphopt.inspect.request import Format, Request, write
from graphopt.inspect.views import check as check_view
from graphopt.inspect.views import compare as compare_view
from graphopt.inspect.views import graph as graph_view
from graphopt.inspect.views import memory as memory_view
from graphopt.inspect.views import parameters as parameters_view
from graphopt.inspect.views import schedule as schedule_view
from graphopt.inspect.views import source as source_view
from graphopt.inspect.views import stages as stages_view
from graphopt.inspect.views import summary as summary_view
from graphopt.inspect.views import why as why_view
from graphopt.inspect.views.base import View
from graphopt.inspect.views.memory_picture import write_picture
from graphopt.ir import Level
from graphopt.nearest import nearest

# A command line that cannot be read; typer has taken click in, and gives this class no public name.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

Target = Annotated[
    str, typer.Argument(help="package.module:factory or file.py:factory, giving (model, example inputs)")
]
PlanOption = Annotated[str, typer.Option("--plan", help="plan text (dp=4,zero=3) or a .yaml, .json or .toml file")]
World = Annotated[int | None, typer.Option("--world", help="ranks; by default the product of the plan's mesh")]
HardwareOption = Annotated[str, typer.Option("--hardware", help="what ranks run on: a name, or a file that says")]
Evaluation = Annotated[bool, typer.Option("--eval", help="the program of evaluation, without gradients")]
StageOption = Annotated[int, typer.Option("--stage", help="of a plan that cuts the model into stages, which")]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="how the answer is written")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="the file to write; by default the terminal")]
PassOption = Annotated[str | None, typer.Option("--after", help="the pass after which to look; by default the last")]
Against = Annotated[str, typer.Option("--against", help="the other plan")]


def view(function: Callable[..., View]) -> Callable[..., None]:
    """A command that answers with a view: `function(request, …)` with the options that all views have."""

    @functools.wraps(function)
    def command(
        target: str,
        plan: str,
        world: int | None,
        hardware: str,
        evaluation: bool,
        stage: int,
        form: Format,
        output: Path | None,
        **options: Any,
    ) -> None:
        request = Request(target, plan, world, hardware, evaluation, stage)
        answer = function(request, **options)
        write(answer, request, form, output)
        if answer.failed:
            raise typer.Exit(1)

    common = {
        "plan": (PlanOption, ""),
        "world": (World, None),
        "hardware": (HardwareOption, "h100-sxm"),
        "evaluation": (Evaluation, False),
        "stage": (StageOption, 0),
        "form": (FormatOption, Format.TEXT),
        "output": (Output, None),
    }
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [
        inspect.Parameter("target", inspect.Parameter.KEYWORD_ONLY, annotation=Target),
        *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in common.items()
        ),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command()(command)
    return command


@view
def summary(request: Request) -> View:
    """Passes, communication, memory and time."""
    return summary_view.summary(request.inspection)


@view
def stages(request: Request) -> View:
    """What each stage of a pipeline does, and its schedule."""
    return stages_view.stages(request.resolved, request.of_stage)


@view
def passes(request: Request) -> View:
    """What each pass did, and how long it took."""
    return summary_view.passes(request.inspection)


@view
def communication(request: Request) -> View:
    """Calls and bytes of each collective in a step."""
    return summary_view.communication(request.inspection)


@view
def kernels(request: Request) -> View:
    """Which variant computes each operator that has a kernel, and why."""
    return summary_view.kernels(request.inspection)


@view
def parameters(request: Request) -> View:
    """How each parameter lies over each axis of the mesh."""
    return parameters_view.parameters(request.inspection)


@view
def memory(
    request: Request,
    sweep: Annotated[list[str] | None, typer.Option(help="evaluate the closed form: batch=2,4,8 (repeatable)")] = None,
    optimizer: Annotated[str | None, typer.Option(help="count its state too: adamw, momentum or sgd")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the timeline too, as SVG")] = None,
) -> View:
    """Bytes on one rank by category, over the step, what makes the peak, and its closed form over sizes."""
    sizes = memory_view.parse_sweep(sweep or [])
    if picture is not None:
        write_picture(memory_view.memory_with(request.inspection, optimizer), request.inspection, picture)
    return memory_view.memory(request.inspection, sizes, optimizer)


@view
def schedule(
    request: Request,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace too, for Perfetto")] = None,
) -> View:
    """What a rank computes and sends when, after the cost model."""
    if trace is not None:
        schedule_view.write_trace(request.inspection, trace)
    return schedule_view.schedule(request.inspection)


@view
def graph(
    request: Request,
    after: PassOption = None,
    level: Annotated[Level | None, typer.Option(help="the last graph of this level")] = None,
    unfold: Annotated[str | None, typer.Option(help="pattern of module paths to unfold; * for all")] = None,
    search: Annotated[str | None, typer.Option(help="show the nodes whose name, operator or module has this")] = None,
) -> View:
    """The program after a pass, folded by module and repeated layer."""
    found = request.inspection
    stage = len(found.stages) - 1
    if after is not None:
        stage = found.stage_after(after)
    elif level is not None:
        stage = found.last_of(level)
    return graph_view.graph(found, stage, unfold, search)


@view
def diff(
    request: Request,
    pass_name: Annotated[str, typer.Argument(metavar="PASS", help="the pass whose changes to show")],
) -> View:
    """What a pass made, changed, moved and removed, and from which node."""
    return graph_view.diff(request.inspection, request.inspection.stage_after(pass_name))


@view
def why(
    request: Request, node: Annotated[str, typer.Argument(metavar="NODE", help="a node of the last graph")]
) -> View:
    """Why a node is what and where it is, and the passes behind it."""
    return why_view.why(request.inspection, node)


@view
def compare(request: Request, against: Against) -> View:
    """Two plans side by side."""
    return compare_view.compare(request.inspection, request.under(against))


@view
def source(
    request: Request,
    standalone: Annotated[bool, typer.Option(help="a file that runs on its own, with torch alone")] = False,
) -> View:
    """The program as Python."""
    return source_view.source(request.inspection, standalone)


@view
def check(request: Request) -> View:
    """Run the program after each pass beside the model, on all ranks in this process; exit code 1 if one differs."""
    plan = request.resolved
    model, args, kwargs = request.call
    model.train(not request.evaluation)
    with torch.set_grad_enabled(not request.evaluation):
        return check_view.check(differential_check(model, args, kwargs, plan))


app.command(name="replay")(replay_command)


def _with_view(arguments: list[str]) -> list[str]:
    """The summary is the view where a target stands in place of one. Raises GraphoptError for an unknown view."""
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    if not arguments or arguments[0] in names or arguments[0].startswith("-"):
        return arguments
    if ":" in arguments[0]:
        return ["summary", *arguments]
    raise GraphoptError(f"there is no view {arguments[0]!r}; {nearest(arguments[0], names)}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, by default that of the process; an error of the user's is one line and exit code 2."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # it logs what is about to be raised
    given = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(app(_with_view(given), standalone_mode=False))
    except (GraphoptError, _UsageError) as error:
        message = error.format_message() if isinstance(error, _UsageError) else message_of(error)
        print(f"graphopt-inspect: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
