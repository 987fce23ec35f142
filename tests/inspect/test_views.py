"""Every view in every form: text that prints, values that are JSON, DOT that parses, an anchor of the page."""

import json
import math
from collections.abc import Callable
from xml.etree import ElementTree

import pydot
import pytest
from rich.console import Console

from graphopt.cost.chrome_trace import chrome_trace
from graphopt.errors import GraphoptError
from graphopt.inspect.document import document
from graphopt.inspect.fold import fold
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.placement import placements
from graphopt.inspect.views import compare, graph, memory, parameters, schedule, source, summary, why
from graphopt.inspect.views.base import View
from graphopt.inspect.views.memory_picture import picture
from graphopt.ir import OutputKind
from graphopt.ir.copies import COPY_OUT
from graphopt.sizes import readable_size
from tests.support.inspected import PLAN, inspected


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspected()


@pytest.fixture(scope="module")
def other() -> Inspection:
    return inspected(plan="dp=2,zero=1")


@pytest.fixture(scope="module")
def moved() -> Inspection:
    return inspected(plan="dp=2,zero=3,offload=disk,offload.least_bytes=0")


@pytest.fixture(scope="module")
def tensor_parallel() -> Inspection:
    return inspected(plan="tp=2,dp=2,zero=3,zero.whole_below=0")


VIEWS: dict[str, Callable[[Inspection, Inspection], View]] = {
    "summary": lambda found, _: summary.summary(found),
    "passes": lambda found, _: summary.passes(found),
    "communication": lambda found, _: summary.communication(found),
    "parameters": lambda found, _: parameters.parameters(found),
    "memory": lambda found, _: memory.memory(found),
    "schedule": lambda found, _: schedule.schedule(found),
    "folded": lambda found, _: graph.graph(found, len(found.stages) - 1, None, None),
    "unfolded": lambda found, _: graph.graph(found, 0, "*", None),
    "searched": lambda found, _: graph.graph(found, 3, None, "all_gather"),
    "diff": lambda found, _: graph.diff(found, 3),
    "why": lambda found, _: why.why(found, "mm_3"),
    "compare": lambda found, another: compare.compare(found, another),
    "source": lambda found, _: source.source(found, standalone=False),
}


def _text(view: View) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(view.text())
    return captured.get()


@pytest.mark.parametrize("name", VIEWS)
def test_text_values_and_drawing(name: str, inspection: Inspection, other: Inspection) -> None:
    view = VIEWS[name](inspection, other)
    assert _text(view).strip()
    assert json.loads(json.dumps(view.values(), allow_nan=False))
    (parsed,) = pydot.graph_from_dot_data(view.drawing().dot())
    frames = [parsed, *parsed.get_subgraphs()]
    assert sum(len(frame.get_nodes()) for frame in frames) > 1
    assert len(parsed.get_edges()) == len(view.drawing().arrows)


def test_kernels_are_told_with_the_reason_of_each_choice() -> None:
    view = summary.kernels(inspected(plan="kernels=auto"))
    first, *others = view.values()["kernels"]
    assert first["why"].startswith("torch.float32 on cpu, rows of ") and first["variant"] == "cuda" and others
    assert first["operator"] in _text(view) and len(view.drawing().boxes) == 1 + len(others)


def test_folds_hold_every_node_once(inspection: Inspection) -> None:
    stage = inspection.stages[-1]
    folds = fold(stage.nodes, inspection.repeats)
    names = [record.name for top in folds for record in top.all_nodes()]
    assert sorted(names) == sorted(record.name for record in stage.nodes)
    assert [top.label for top in folds] == ["inputs", "forward", "backward", "outputs"]
    assert inspection.repeats == [["model.layers.0", "model.layers.1"]]
    (model,) = (inner for inner in folds[1].folds if inner.path == "model")
    assert [inner.alike for inner in model.folds if "layers" in inner.label] == [2]


def test_a_folded_graph_shows_the_layers_once_and_unfolds_where_asked(inspection: Inspection) -> None:
    last = len(inspection.stages) - 1
    folded = _text(graph.graph(inspection, last, None, None))
    assert "layers.0 … 1" in folded and "2 alike" in folded and "aten.mm" not in folded
    unfolded = _text(graph.graph(inspection, last, "model.layers.0.mlp.gate_proj", None))
    assert unfolded.count("aten.mm.default") == 1


def test_a_diff_shows_what_came_from_where(inspection: Inspection) -> None:
    shown = _text(graph.diff(inspection, inspection.stage_after("zero")))
    assert "# from" in shown and "# in its place" in shown


def test_the_timeline_adds_up_to_the_peak(inspection: Inspection) -> None:
    found = inspection.report.memory
    alive = 0
    for steps in found.steps().values():
        alive += next((size for position, size in reversed(steps) if position <= found.peak_position), 0)
    assert alive == found.peak_bytes == max(max(found.timeline), found.peak_bytes)
    assert sum(life.size for life in found.at_peak()) == found.peak_bytes


def test_a_sweep_says_the_peak_at_each_size_or_why_not(inspection: Inspection) -> None:
    view = memory.memory(inspection, {"ranks": [2, 3]}, "adamw")
    known, unknown = view.values()["sweep"]
    shard = known["by_category"]["parameters"]
    assert known["by_category"]["optimizer"] > 2 * shard - 4096, "small parameters stay whole"
    assert known["peak_bytes"] == view.values()["peak_bytes"]
    assert "padding makes another program" in unknown["unknown"]
    shown = _text(view)
    assert "not known" in shown and "/ranks" in shown and "the peak is the largest of" in shown


@pytest.mark.parametrize(
    ("sweep", "optimizer", "said"),
    [({"rank": [2]}, None, "'rank'; the nearest is 'ranks'"), ({}, "adamv", "'adamv'; the nearest is 'adamw'")],
)
def test_a_sweep_of_nothing_is_refused(
    inspection: Inspection, sweep: dict[str, list[int]], optimizer: str | None, said: str
) -> None:
    with pytest.raises(GraphoptError) as raised:
        memory.memory(inspection, sweep, optimizer).values()
    assert said in str(raised.value)


def test_a_picture_shows_every_category_up_to_the_peak(inspection: Inspection) -> None:
    found = inspection.report.memory
    drawn = ElementTree.fromstring(picture(found, len(inspection.program.graph.nodes)))
    name = "{http://www.w3.org/2000/svg}"
    areas = {area.findtext(f"{name}title"): area.get("points", "") for area in drawn.iter(f"{name}polygon")}
    assert areas.keys() == found.by_category.keys()
    heights = [float(point.split(",")[1]) for points in areas.values() for point in points.split()]
    assert min(heights) == 40, "the peak is as high as the picture"


def test_what_is_elsewhere_stands_beside_the_peak(moved: Inspection, inspection: Inspection) -> None:
    view, (place,) = memory.memory(moved), moved.report.memory.elsewhere
    size = moved.report.memory.elsewhere[place]
    assert place == "disk" and view.values()["elsewhere"] == {"disk": size} and size > 0
    for shown in (view, summary.summary(moved)):
        assert any("elsewhere: on disk" in line and readable_size(size) in line for line in _text(shown).splitlines())
    drawn = ElementTree.fromstring(picture(moved.report.memory, len(moved.program.graph.nodes)))
    assert (drawn.findtext("{http://www.w3.org/2000/svg}title") or "").endswith(f", and {readable_size(size)} on disk")
    rows = {row[0]: row[1:] for row in compare.compare(inspection, moved).values()["rows"]}
    assert rows["elsewhere: on disk, at most"] == ["0 B", readable_size(size), "new"]
    assert "elsewhere" not in _text(memory.memory(inspection)), "nothing is"


def test_on_a_cpu_what_is_on_the_host_is_a_part_of_the_peak() -> None:
    found = inspected(plan="dp=2,zero=3,offload=host,offload.least_bytes=0")
    assert not found.report.memory.elsewhere and found.report.memory.by_category["host"] > 0
    test_a_picture_shows_every_category_up_to_the_peak(found)
    shares = [life for life in found.report.memory.lives if life.category == "host"]
    copies = found.program.graph.find_nodes(op="call_function", target=COPY_OUT)
    assert {life.owner for life in shares} == {node.name for node in copies}


def test_gradients_end_up_as_shards_and_begin_as_parts_of_a_sum(inspection: Inspection) -> None:
    placed = placements(inspection.program, inspection.recorder.layouts)
    ends = {placed[node] for _, node in inspection.program.results_of(OutputKind.GRADIENT) if node is not None}
    assert ends == {"shard 0 of dp", "replicated"}  # norms stay whole
    assert "partial over dp" in placed.values()


def test_parameters_say_which_dimension_each_axis_cuts(tensor_parallel: Inspection) -> None:
    view = parameters.parameters(tensor_parallel)
    cut = {row["name"]: row["cut"] for row in view.values()}
    assert cut["model.layers.0.mlp.gate_proj.weight"] == {"tp": 0, "dp": 0}
    assert cut["model.layers.1.mlp.down_proj.weight"] == {"tp": 1, "dp": 0}
    assert cut["lm_head.weight"] == {"dp": 0}, "199 rows have no equal parts"
    rows = [line for line in _text(view).splitlines() if "down_proj" in line]
    assert len(rows) == 1, "layers are alike"
    assert [cell.strip() for cell in rows[0].split("│")[2:-1]] == ["[64, 128]", "dimension 1", "dimension 0", "8.0 KiB"]
    reasons = tensor_parallel.explanations["model_layers_0_mlp_down_proj_weight_shard"]
    assert "split: of [64, 128] the program sees [64, 64]: equal parts of dimension 1, one of 2 over tp" in reasons
    summed = next(record for record in tensor_parallel.stages[-1].nodes if "all_reduce" in record.target)
    assert any(each.startswith("all-reduce") for each in tensor_parallel.explanations[summed.name])


def test_values_lie_over_each_axis_by_themselves(tensor_parallel: Inspection) -> None:
    split = tensor_parallel.stages[tensor_parallel.stage_after("split")]
    placed = {record.name: record.placement for record in split.nodes}
    by_module = {
        record.facts.module: placed[record.name] for record in split.nodes if record.target == "aten.linear.default"
    }
    assert placed["p_model_model_layers_0_mlp_down_proj_weight"] == "part 1 of tp"
    assert by_module["model.layers.0.mlp.gate_proj"] == "of own batch, of own part over tp"
    assert by_module["model.layers.0.mlp.down_proj"] == "of own batch, partial over tp"
    for record in split.nodes:
        if record.target == "graphopt.leave.default":
            assert placed[record.inputs[0]].endswith("partial over tp") and placed[record.name] == "of own batch"
    last = tensor_parallel.stages[-1]
    assert {r.placement for r in last.nodes if "gate_proj_weight_shard" in r.name} == {"shard 0 of dp, part 0 of tp"}


def test_the_document_says_each_stage_again(inspection: Inspection, other: Inspection) -> None:
    values = json.loads(json.dumps(document(inspection)))
    strings, names = values["strings"], values["records"]["name"]
    for stage, said in zip(inspection.stages, values["stages"], strict=True):
        order = [first + offset for first, count in said["order"] for offset in range(count)]
        assert [strings[names[number]] for number in order] == [record.name for record in stage.nodes]
    assert {len(column) for column in values["records"].values()} == {len(names)}
    told = {strings[int(name)]: [strings[each] for each in why] for name, why in values["why"].items()}
    assert told == inspection.explanations
    peak = values["memory"]["at_peak"]
    assert sum(size for _, _, size, _, _ in peak) == values["memory"]["peak_bytes"]
    total = max(start + duration for _, _, start, duration in values["schedule"]["tasks"])
    assert math.isclose(total, values["schedule"]["total_us"], rel_tol=1e-3)


def test_two_plans_differ_where_zero_says(inspection: Inspection, other: Inspection) -> None:
    values = compare.compare(inspection, other).values()
    assert values["left"].startswith(PLAN) and values["right"] == "dp=2,zero=1"
    rows = {row[0]: row[1:] for row in values["rows"]}
    assert float(rows["bytes sent"][2]) < 1.0, "stage 1 gathers once"
    backward = [row for row in values["moved"] if row[0].endswith("gathered in backward")]
    assert backward and all(row[2] == "nowhere" for row in backward)


def test_the_same_plan_differs_nowhere(inspection: Inspection) -> None:
    values = compare.compare(inspection, inspected()).values()
    assert values["moved"] == [] and all(row[3] in ("1.000", "") for row in values["rows"])


def test_the_trace_has_an_event_for_every_task(inspection: Inspection) -> None:
    events = chrome_trace(inspection.schedule, [0, 1])["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["cat"] != "stall"]
    assert len(spans) == 2 * len(inspection.schedule.tasks)
