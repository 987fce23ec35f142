"""Reasons are those of the program: checked against the graph, not against the text's own source."""

import pytest

from graphopt.inspect.inspection import Inspection
from graphopt.ir import Phase, facts_of
from graphopt.ir.collectives import collectives_of
from graphopt.ir.copies import COPIED_OUT, copies_of
from tests.support.inspected import inspected


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspected()


def _one(sentences: list[str], start: str) -> str:
    (found,) = (sentence for sentence in sentences if sentence.startswith(start))
    return found


def test_every_node_has_a_past_and_nearly_every_one_a_reason(inspection: Inspection) -> None:
    names = {node.name for node in inspection.program.graph.nodes if node.op != "output"}
    assert inspection.explanations.keys() == names
    assert all(inspection.lineage.chain(name)[-1][1] == "made" for name in names)
    silent = [name for name, sentences in inspection.explanations.items() if not sentences]
    assert len(silent) < len(names) / 10


def test_what_backward_reads_of_forward_is_said_to_be_saved(inspection: Inspection) -> None:
    for node in inspection.program.compute_nodes(Phase.FORWARD):
        readers = {user.name for user in node.users if user.op != "output" and facts_of(user).phase is Phase.BACKWARD}
        saved = [each for each in inspection.explanations[node.name] if each.startswith("saved for backward")]
        assert bool(saved) == bool(readers), node.name
        assert not readers or any(name in saved[0] for name in readers)


def test_a_gather_names_its_first_reader_its_bucket_and_its_launch(inspection: Inspection) -> None:
    gathers = [each for each in collectives_of(inspection.program) if each.kind == "all-gather"]
    several = next(each for each in gathers if len(each.node.args[0]) > 1)  # type: ignore[arg-type]
    sentences = inspection.explanations[several.node.name]
    waits = [wait for item in several.node.users for wait in item.users]
    order = list(inspection.program.graph.nodes)
    first = min((reader for wait in waits for reader in wait.users), key=order.index)
    assert f"first needed by {first.name} in {facts_of(first).module}" in sentences
    assert _one(sentences, "bucket:").startswith(f"bucket: {len(several.node.args[0])} in one")  # type: ignore[arg-type]
    assert any(sentence.startswith("zero: stage 3 gathers") for sentence in sentences)
    assert any(sentence.startswith("schedule: launched before") for sentence in sentences)


def test_a_value_is_said_to_be_released_after_its_last_reader(inspection: Inspection) -> None:
    order = {node: index for index, node in enumerate(inspection.program.graph.nodes)}
    gather = collectives_of(inspection.program)[0].node
    (item, *_) = gather.users
    (wait,) = item.users
    said = _one(inspection.explanations[wait.name], "released after ").split()[2]
    todo, last = [wait], wait
    while todo:  # everything that reads it, or reads a view of it
        for user in todo.pop().users:
            last = max(last, user, key=order.__getitem__)
            if user.target in _VIEWS:
                todo.append(user)
    assert said == last.name


def test_the_chain_goes_back_to_the_models_line(inspection: Inspection) -> None:
    chain = inspection.lineage.chain(collectives_of(inspection.program)[0].node.name)
    passes = [text for text, _, _ in chain]
    assert passes[-1] == "capture" and chain[-1][1] == "made" and chain[-1][2].facts.source is not None
    assert "zero" in passes and "differentiate" in passes


def test_resident_and_whole_parameters_say_so() -> None:
    found = inspected(plan="dp=2,zero=1,zero.whole_below=1KiB")
    gather = collectives_of(found.program)[0].node
    assert any("keeps" in each and "over steps" in each for each in found.explanations[gather.name])
    assert any(each.startswith("stays whole on each of 2 ranks") for each in found.explanations["model_norm_weight"])
    shard = found.explanations["lm_head_weight_shard"]
    assert "is this rank's part of [199, 64]: 100 of 199 rows of dimension 0, 25.0 KiB; one of 2 over dp" in shard


def test_a_recomputed_transpose_says_why() -> None:
    found = inspected("gpt2")
    repeated = [r for r in found.stages[-1].nodes if any("made of weights alone" in s for s in r.facts.reasons)]
    assert repeated and all(record.facts.phase is Phase.BACKWARD for record in repeated)


def _views() -> set[object]:
    import torch

    aten = torch.ops.aten
    return {aten.slice.Tensor, aten.view.default, aten.t.default, aten._unsafe_view.default, aten.transpose.int}


_VIEWS = _views()


def test_copies_say_where_they_go_who_waits_and_why() -> None:
    found = inspected(plan="dp=2,zero=3,offload=disk,offload.least_bytes=0")
    position = {node.name: index for index, node in enumerate(found.program.graph.nodes)}
    for copy in copies_of(found.program):
        said = _one(found.explanations[copy.launch.name], "copies ")
        between = position[copy.wait.name] - position[copy.launch.name] - 1
        assert said.endswith(f" {copy.link}; waited for by {copy.wait.name}, {between} nodes later")
        moved_apart = copy.wait if copy.is_out else copy.launch
        assert _one(found.explanations[moved_apart.name], "overlap: ")
        if not copy.is_out:
            assert _one(found.explanations[copy.wait.name], "offload: waits for backward on disk")
    for kept in found.program.graph.find_nodes(op="call_function", target=COPIED_OUT):
        assert _one(found.explanations[kept.name], "saved for backward on disk: ")
