"""offload and overlap: what is saved is elsewhere meanwhile, no bit changes, and copies run beside compute."""

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from bench.live import most_alive
from graphopt import Offload, Plan, PlanError
from graphopt.cost.hardware import Hardware, Link
from graphopt.cost.memory import Memory, memory
from graphopt.cost.simulator import simulate
from graphopt.errors import OffloadError, PassError
from graphopt.inspect.differential import check
from graphopt.ir import Phase, Program, facts_of
from graphopt.ir.copies import COPIED_OUT, copies_of
from graphopt.ir.liveness import storage_of
from graphopt.lowering import Compilation, lower
from graphopt.passes.offload import OffloadOptions
from graphopt.passes.overlap import OverlapOptions
from tests.support.training import STEPS, differences
from tests.support.zoo import CONVNET, WITH_DROPOUT, ZOO, Entry

MODELS: dict[str, Entry] = {
    **{name: ZOO[name] for name in ("llama", "t5", "mixtral", "odd")},
    "gpt2 with dropout": WITH_DROPOUT["gpt2"],
    "convnet": CONVNET,
}
ALL = "offload.least_bytes=0"


def _program(name: str, plan: str, ranks: int = 2) -> Program:
    programs: list[Program] = []
    entry = MODELS[name]
    resolved = Plan.parse(plan).resolve(ranks)
    lower(entry.build(), (), entry.batch(), resolved, observer=lambda _, program: programs.append(program))
    return programs[-1]


def _saved(program: Program) -> list[torch.fx.Node]:
    """What forward leaves for backward: the storages' owners."""
    owner = storage_of(program)
    read = {s for n in program.compute_nodes(Phase.BACKWARD) for s in n.all_input_nodes if s.op == "call_function"}
    forward = {owner[node] for node in read if facts_of(node).phase is Phase.FORWARD}
    return sorted(node for node in forward if node.op == "call_function")


@pytest.mark.parametrize("plan", ["zero=3,remat=full", "zero=2", "zero=3,precision=bf16,zero.keep_gathered=true"])
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_changes(name: str, plan: str) -> None:
    if name in ("odd", "convnet"):
        plan = plan.replace(",remat=full", "")
    entry = MODELS[name]
    full = Plan.parse(f"dp=2,zero.whole_below=0,{plan},offload=disk,{ALL}").resolve(2)
    verdict = check(entry.build(), (), entry.batch(), full)
    assert verdict.guilty is None
    assert {each.name for each in verdict.comparisons if each.worst == 0.0} >= {"offload", "overlap"}


def _trained(rank: int, world: int, name: str, plans: list[str]) -> list[list[str]]:
    return differences(MODELS[name], plans, rank, world)


@pytest.mark.parametrize("name", MODELS)
def test_training_on_one_rank_is_bitwise_that_in_memory(name: str) -> None:
    assert _trained(0, 1, name, ["zero=0", f"offload=host,{ALL}", f"offload=disk,{ALL}"]) == [[], []]


def test_training_on_two_ranks_is_bitwise_that_in_memory(ranks) -> None:
    in_files = [f"zero={stage},offload=disk,{ALL}" for stage in range(4)]
    computed_again = [f"zero={stage},remat=full,offload=host,{ALL}" for stage in (1, 3)]
    for found in ranks(2).run(_trained, "gpt2 with dropout", ["zero=0", *in_files, *computed_again]):
        assert found == [[]] * 6


def _peak(rank: int, world: int, name: str, plan: str) -> tuple[int, Memory]:
    torch.manual_seed(0)
    entry = MODELS[name]
    model = graphopt.compile(entry.build(), plan)
    batch = {key: value.clone() for key, value in entry.part(entry.batch(), rank, world).items()}
    return most_alive(model, batch, waits=True), graphopt.report(model).memory


@pytest.mark.parametrize("plan", [f"offload=host,{ALL}", f"offload=disk,{ALL}", f"remat=selective,offload=disk,{ALL}"])
@pytest.mark.parametrize("name", ["llama", "convnet"])
def test_the_peak_is_what_a_run_reaches(name: str, plan: str) -> None:
    if name == "convnet":
        plan = plan.replace("remat=selective,", "")
    measured, predicted = _peak(0, 1, name, plan)
    assert predicted.peak_bytes == measured


def test_the_peak_is_what_a_run_on_two_ranks_reaches(ranks) -> None:
    plan = f"zero=3,zero.whole_below=0,transport=group,offload=disk,{ALL}"
    for measured, predicted in ranks(2).run(_peak, "llama", plan):
        assert predicted.peak_bytes == measured


def test_files_hold_what_memory_held() -> None:
    plain, moved = (memory(_program("llama", plan, 1), {}) for plan in ("zero=0", f"offload=disk,{ALL}"))
    assert moved.elsewhere["disk"] > 0.9 * plain.by_category["activations"]
    assert moved.peak_bytes < plain.peak_bytes - 0.5 * plain.by_category["activations"]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_large_is_saved_but_copies_and_what_stays_anyway(name: str) -> None:
    program = _program(name, f"zero=3,zero.whole_below=0,offload=disk,{ALL}")
    results = {storage_of(program)[node] for node in program.results if node is not None}
    for node in _saved(program):
        assert facts_of(node).outside or node in results or not isinstance(node.meta["val"], torch.Tensor), node


def test_smaller_values_stay() -> None:
    program = _program("llama", "offload=disk,offload.least_bytes=20000", 1)
    moved = [copy.launch.meta["val"].nbytes for copy in copies_of(program)]
    assert moved and min(moved) >= 20000


def _hardware(bandwidth: float) -> Hardware:
    return Hardware("test", {"float32": 1e12}, 1e11, 1 << 30, 1e-6, Link(1e10, 0.0), host=Link(bandwidth, 0.0))


def _over(bandwidth: float, folder: Path) -> Program:
    """A Llama whose saved values go to the host over such a link."""
    path = folder / "hardware.json"
    path.write_text(json.dumps(_hardware(bandwidth).to_dict()))
    return _program("llama", f"offload=host,{ALL},hardware={path}", 1)


def test_a_fast_link_hides_all_copies_and_a_slow_one_holds_up(tmp_path: Path) -> None:
    stalls = []
    for bandwidth in (1e13, 1e7):
        program = _over(bandwidth, tmp_path)
        stalls.append(simulate(program, {}, _hardware(bandwidth)).exposed_seconds)
    assert stalls[0] < 1e-6 < 1e-3 < stalls[1]


def test_copies_back_are_launched_before_their_use_and_waits_for_copies_out_come_later(tmp_path: Path) -> None:
    program = _over(1e10, tmp_path)
    place = {node: position for position, node in enumerate(program.graph.nodes)}
    apart = [place[copy.wait] - place[copy.launch] for copy in copies_of(program)]
    assert sum(distance > 1 for distance in apart) > 0.9 * len(apart)
    for link in ("to host", "from host"):
        waits = [place[copy.wait] for copy in copies_of(program) if copy.link == link]
        assert waits == sorted(waits), "what travels over one link arrives in order"


def test_a_slow_link_has_no_more_than_two_copies_back_under_way(tmp_path: Path) -> None:
    program = _over(1e6, tmp_path)
    under_way = most = 0
    waits = {copy.wait for copy in copies_of(program) if not copy.is_out}
    launches = {copy.launch for copy in copies_of(program) if not copy.is_out}
    for node in program.graph.nodes:
        under_way += (node in launches) - (node in waits)
        most = max(most, under_way)
    assert most == 2


def _budgeted(share: float, bandwidth: float, folder: Path) -> tuple[Compilation, dict[str, Any]]:
    """A Llama under a budget on a device with a memory of its own, and what was chosen."""
    path = folder / "hardware.json"
    path.write_text(json.dumps(_hardware(bandwidth).to_dict()))
    entry = MODELS["llama"]
    plan = Plan.parse(f"remat={share},offload=host,{ALL},hardware={path}").resolve(1)
    compilation = lower(entry.build(), (), entry.batch(), plan)
    (record,) = (record for record in compilation.report.passes if record.name == "rematerialize")
    return compilation, record.statistics


def test_a_budget_is_kept_by_copies_where_they_are_free_else_by_computing_again(tmp_path: Path) -> None:
    free, mixed, costly = (_budgeted(0.5, bandwidth, tmp_path)[1] for bandwidth in (1e13, 2e9, 1e5))
    assert free["moved"] > 0 == free["repeated"]
    assert mixed["moved"] > 0 < mixed["repeated"]
    assert costly["moved"] == 0 < costly["repeated"]
    assert all(each["peak_bytes"] <= each["limit_bytes"] for each in (free, mixed, costly))


def test_the_smaller_the_budget_the_lower_the_peak_and_the_more_is_done(tmp_path: Path) -> None:
    chosen = [_budgeted(share, 2e9, tmp_path) for share in (1.0, 0.8, 0.6, 0.4)]
    peaks = [compilation.report.memory.peak_bytes for compilation, _ in chosen]
    assert peaks == [found["peak_bytes"] for _, found in chosen] == sorted(peaks, reverse=True)
    assert chosen[0][1]["moved"] == chosen[0][1]["repeated"] == 0
    repeated = [found["repeated"] for _, found in chosen]
    assert repeated == sorted(repeated)


def test_on_a_cpu_the_host_has_no_room_that_the_budget_does_not_count() -> None:
    entry = MODELS["llama"]
    plan = Plan.parse(f"remat=0.5,offload=host,{ALL}").resolve(1)
    (record,) = (r for r in lower(entry.build(), (), entry.batch(), plan).report.passes if r.name == "rematerialize")
    assert record.statistics["moved"] == 0 < record.statistics["repeated"]


def test_a_budget_with_copies_changes_no_bit() -> None:
    entry = MODELS["gpt2 with dropout"]
    plan = Plan.parse(f"dp=2,zero=3,zero.whole_below=0,remat=0.7,offload=disk,{ALL}").resolve(2)
    verdict = check(entry.build(), (), entry.batch(), plan)
    assert verdict.guilty is None
    assert {each.name: each.worst for each in verdict.comparisons}["rematerialize"] == 0.0


def test_a_budget_that_files_make_possible() -> None:
    entry = MODELS["llama"]
    floors = []
    for place in ("", f",offload=disk,{ALL}"):
        with pytest.raises(PassError, match="out of reach") as caught:
            lower(entry.build(), (), entry.batch(), Plan.parse(f"remat=1{place}").resolve(1))
        floors.append(int(str(caught.value).partition("nearest is ")[2].split()[0]))
    assert floors[1] < floors[0]


def test_a_file_that_is_gone_is_named_with_the_value(tmp_path: Path) -> None:
    model = graphopt.compile(MODELS["llama"].build(), Plan(offload=Offload("disk", 0, tmp_path)))
    before = copy.deepcopy([parameter.detach() for parameter in model.parameters()])
    loss = model(**MODELS["llama"].batch()).loss
    files = list(tmp_path.rglob("*.tensor"))
    assert files
    for file in files:
        file.unlink()
    with pytest.raises(OffloadError, match=r"getting \w+ back for backward: cannot read .*\.tensor: No such file"):
        loss.backward()
    assert all(torch.equal(parameter, was) for parameter, was in zip(model.parameters(), before, strict=True))


def test_files_are_used_again_and_removed_in_the_end(tmp_path: Path) -> None:
    model = graphopt.compile(MODELS["llama"].build(), Plan(offload=Offload("disk", 0, tmp_path)))
    counts = []
    for _ in range(STEPS):
        model(**MODELS["llama"].batch()).loss.backward()
        counts.append(len(list(tmp_path.rglob("*.tensor"))))
    assert len(set(counts)) == 1
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_backward_twice_over_a_graph_that_is_retained() -> None:
    entry = MODELS["llama"]
    gradients = []
    for plan in ("zero=0", f"offload=disk,{ALL}"):
        torch.manual_seed(0)
        model = graphopt.compile(entry.build(), plan)
        loss = model(**entry.batch()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"offload.place='dsk'.*'disk'"):
        Offload("dsk")
    with pytest.raises(PlanError, match="Inductor"):
        Plan(offload="disk", executor="inductor")
    with pytest.raises(PlanError, match=r"offload\.folder=3 is no path"):
        Offload(folder=3)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="no place 'dsk'"):
        OffloadOptions("dsk")
    with pytest.raises(PassError, match="depth=0"):
        OverlapOptions(0)
    (tmp_path / "file").write_text("")
    model = graphopt.compile(MODELS["llama"].build(), Plan(offload=Offload("disk", 0, tmp_path / "file")))
    with pytest.raises(OffloadError, match="cannot write to the folder"):
        model(**MODELS["llama"].batch())


def test_text_and_plan_are_one() -> None:
    plan = Plan(offload=Offload("disk", "2MiB", "/scratch"))
    assert Plan.parse(str(plan)) == plan and "offload=disk" in str(plan)


def test_what_is_elsewhere_is_read_by_copies_back_alone() -> None:
    program = _program("llama", f"offload=disk,{ALL}", 1)
    for node in program.graph.find_nodes(op="call_function", target=COPIED_OUT):
        assert {str(user.target) for user in node.users} <= {"graphopt.copy_in.default", "graphopt.copied_in.default"}
