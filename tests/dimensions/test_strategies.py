"""Cuts and the parts that they make, beside what torch does with strided parts."""

import pytest

from graphopt.dimensions.forms import PARTIAL, REPLICATED, VARYING, Kind, Move, Part, moves
from graphopt.dimensions.signature import Signature
from graphopt.dimensions.strategies import Cut, Strategy, cut_by, own_cuts, split_strategy, whole_strategies

# x [t, i] times w [o, i], and a bias [o]
LINEAR = Signature(
    operands=((("t",), ("i",)), (("o",), ("i",)), (("o",),)),
    results=((("t",), ("o",)),),
    sizes={"t": 6, "i": 8, "o": 12},
    addends=frozenset({2}),
    linear=(frozenset({0, 2}), frozenset({1, 2})),
)
HEADS = Signature(operands=((("b",), ("h", "d")),), results=((("b",), ("h",), ("d",)),), sizes={"b": 2, "h": 5, "d": 4})
PACKED = Signature(
    operands=((("three", "h"),),), results=((("h",),),) * 3, sizes={"three": 3, "h": 8}, whole=frozenset({"three"})
)


def test_columns_and_rows_of_a_product() -> None:
    columns = split_strategy(LINEAR, Cut("o", 1, 6))
    assert columns.operands == (VARYING, Part(0, 1, 6), Part(0, 1, 6))
    assert columns.results == (Part(1, 1, 6),)
    rows = split_strategy(LINEAR, Cut("i", 1, 4))
    assert rows.operands == (Part(1, 1, 4), Part(1, 1, 4), PARTIAL)
    assert rows.results == (PARTIAL,)


def test_whole_ways_to_run() -> None:
    assert list(whole_strategies(LINEAR)) == [
        Strategy(None, (REPLICATED,) * 3, (REPLICATED,)),
        Strategy(None, (VARYING,) * 3, (VARYING,)),
        Strategy(None, (PARTIAL, VARYING, PARTIAL), (PARTIAL,)),
        Strategy(None, (VARYING, PARTIAL, PARTIAL), (PARTIAL,)),
    ]


def test_parts_are_as_equal_as_can_be_and_none_is_empty() -> None:
    assert list(own_cuts(HEADS, 2)) == [Cut("b", 1, 1), Cut("h", 1, 3), Cut("d", 1, 2)]
    assert list(own_cuts(HEADS, 4)) == [Cut("d", 1, 1)]  # two each leave the last of four ranks no head


@pytest.mark.parametrize("cut", [Cut("h", 1, 3), Cut("d", 1, 2)])
def test_a_view_cuts_what_it_joins(cut: Cut) -> None:
    joined = split_strategy(HEADS, cut).operands[0]
    assert joined == (Part(1, 1, 12) if cut.label == "h" else Part(1, 5, 2))
    assert isinstance(joined, Part)
    assert cut_by(HEADS, HEADS.operands[0], joined) == cut


def test_a_packed_dimension_is_cut_in_each_block() -> None:
    cut = Cut("h", 1, 4)
    assert split_strategy(PACKED, cut) == Strategy(cut, (Part(0, 3, 4),), (Part(0, 1, 4),) * 3)
    assert cut_by(PACKED, PACKED.operands[0], Part(0, 3, 4)) == cut
    assert cut_by(PACKED, PACKED.operands[0], Part(0, 1, 12)) is None


def _steps(source: Kind | Part, wanted: Kind | Part) -> list[Move] | None:
    found = moves(source, wanted, (8, 8), 2)
    return None if found is None else [move for move, _ in found]


def test_moves_compose() -> None:
    part, other, uneven = Part(0, 1, 4), Part(1, 1, 4), Part(1, 1, 5)
    assert _steps(PARTIAL, VARYING) == [Move.LEAVE, Move.ENTER]
    assert _steps(PARTIAL, part) == [Move.SCATTER_SUM]
    assert _steps(part, VARYING) == [Move.GATHER_VARYING]
    assert _steps(part, other) == [Move.ALL_TO_ALL]
    assert _steps(part, uneven) == [Move.GATHER, Move.PART]
    assert _steps(VARYING, REPLICATED) is None and _steps(VARYING, PARTIAL) is None
    assert _steps(part, part) == []
