"""Programs as text: what a line shows, and differences."""

from graphopt.ir import InputKind
from graphopt.ir.printer import diff, format_program
from tests.ir.built import Hand, functional
from tests.support.programs import lowered


def test_a_program_prints_inputs_nodes_and_outputs_with_their_roles() -> None:
    hand = Hand()
    shard = hand.input(2, 3, kind=InputKind.SHARD, name="layer.weight")
    launched = hand.call(functional.all_gather_into_tensor_coalesced.default, [shard], 4, "dp")
    text = format_program(hand.program(hand.waited(launched, 0)))
    assert text.splitlines() == [
        "program at level step",
        "  layer_weight_shard: float32[2, 3] = input (shard layer.weight)",
        "  all_gather_into_tensor_coalesced_default: (float32[8, 3]) = "
        "_c10d_functional.all_gather_into_tensor_coalesced.default([layer_weight_shard], 4, dp)  # forward",
        "  getitem: float32[8, 3] = getitem(all_gather_into_tensor_coalesced_default, 0)  # forward",
        "  wait_tensor_default: float32[8, 3] = _c10d_functional.wait_tensor.default(getitem)  # forward",
        "  output (user 0) = wait_tensor_default",
    ]


def test_a_line_says_where_a_node_comes_from() -> None:
    _, program = lowered("zero=3,zero.whole_below=0")
    lines = format_program(program).splitlines()
    tanh = next(line for line in lines if "aten.tanh.default" in line)
    assert "# forward layers.0.1 activation.py:" in tanh
    assert any(line.endswith("by zero") for line in lines)


def test_a_difference_holds_what_changed_and_two_lines_around() -> None:
    lines = [f"line {index}\n" for index in range(20)]
    changed = [*lines[:10], "another\n", *lines[11:]]
    found = diff("".join(lines), "".join(changed)).splitlines()
    assert found[:3] == ["--- before", "+++ after", "@@ -9,5 +9,5 @@"]
    assert found[3:] == [" line 8", " line 9", "-line 10", "+another", " line 11", " line 12"]
    assert diff("".join(lines), "".join(lines)) == ""
