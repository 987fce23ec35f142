"""What a rank holds of a value over one mesh axis, and what of its gradient.

    form          a rank holds             and of the gradient    in Megatron-LM (Shoeybi et al. 2019)
    REPLICATED    the value                the gradient
    VARYING       the value                a summand              behind f
    PARTIAL       a summand                the gradient           before g
    Part          a part                   that part

Every operator, and every move from one form to another, keeps both columns true; so the program of one rank, with
`autograd` over it, computes what one device would. The distinction of REPLICATED and VARYING is that of JAX's
`shard_map` (its invariant and varying types).
"""

import enum
from collections.abc import Hashable
from dataclasses import dataclass


class Kind(enum.Enum):
    """The forms that hold the value in its whole shape."""

    REPLICATED = "replicated"
    VARYING = "varying"
    PARTIAL = "partial"


class Standing(enum.Enum):
    """How the rows that a rank has stand, where they do not stand as in the whole.

    Of a dimension that is sorted by groups, as tokens are by the expert that they go to, each rank sorts its part.
    """

    GROUPED = "by group"  # the rank's rows, sorted
    PLACES = "places"  # for each of those, where in the part it came from; or the other way round
    ENDS = "ends of groups"  # where among those each group ends
    DISPATCHED = "of own groups"  # the rows of some groups, from all ranks; and zeros
    DISPATCHED_ENDS = "ends of own groups"  # where among those each of these groups ends
    BALANCED = "balanced"  # chunks from both ends, as `ir.context` has them; ranks times `chunk` is a block

    @property
    def is_carried(self) -> bool:
        """Whether what is computed row by row of rows that stand so, stands so."""
        return self in (Standing.GROUPED, Standing.DISPATCHED, Standing.BALANCED)

    @property
    def has_gaps(self) -> bool:
        """Whether there are rows that are none of the whole's, which no sum may count."""
        return self is Standing.DISPATCHED


@dataclass(frozen=True)
class Order:
    """In which order a rank has the rows of its part, where that is not the order of the whole.

    ends: the value that says where groups end, if rows stand by group. part: of the dimension, that which each rank has
    sorted. What was sorted by other groups, or in other parts, does not stand alike.
    """

    standing: Standing
    ends: Hashable = None
    part: "Part | None" = None


@dataclass(frozen=True)
class Part:
    """Dimension `dim` is cut into `blocks` equal blocks, and each block into parts of `chunk`, one for each rank.

    Where ranks times `chunk` exceed a block, the last part is filled up with zeros. order: None for that of the whole.
    """

    dim: int
    blocks: int
    chunk: int
    order: Order | None = None


BALANCED = Order(Standing.BALANCED)

Form = Kind | Part
REPLICATED, VARYING, PARTIAL = Kind.REPLICATED, Kind.VARYING, Kind.PARTIAL


class Move(enum.Enum):
    """A step from one form to another, with what its two directions communicate.

    Bytes are those of the whole value, of which a ring moves (N-1)/N for everything but an all-reduce, which takes
    twice that, and an all-to-all, which moves 1/N of that.
    """

    ENTER = ("enter", "", "all-reduce")  # REPLICATED -> VARYING
    LEAVE = ("leave", "all-reduce", "")  # PARTIAL -> REPLICATED
    PART = ("part", "", "all-gather")  # REPLICATED -> Part
    PART_VARYING = ("part varying", "", "")  # VARYING -> Part
    GATHER = ("gather", "all-gather", "")  # Part -> REPLICATED
    GATHER_VARYING = ("gather varying", "all-gather", "reduce-scatter")  # Part -> VARYING
    SCATTER_SUM = ("scatter sum", "reduce-scatter", "all-gather")  # PARTIAL -> Part
    ALL_TO_ALL = ("all to all", "all-to-all", "all-to-all")  # Part -> Part of another dimension
    FIRST = ("first", "", "")  # REPLICATED -> PARTIAL
    DISPATCH = ("dispatch", "all-to-all", "all-to-all")  # rows by group -> rows of own groups
    COMBINE = ("combine", "all-to-all", "all-to-all")  # and back
    DISPATCH_ENDS = ("dispatch ends", "", "")

    def __init__(self, title: str, forward: str, backward: str) -> None:
        self.title = title
        self.forward = forward
        self.backward = backward


Step = tuple[Move, Form]  # and the form that it leads to


def moves(source: Form, wanted: Form, sizes: tuple[int, ...], ranks: int) -> list[Step] | None:
    """The steps from one form of a value of `sizes` to another; None if no steps lead there."""
    if source == wanted:
        return []
    orders = [form.order if isinstance(form, Part) else None for form in (source, wanted)]
    if not {*orders} <= {None, BALANCED}:
        return _between_orders(wanted, *orders)
    if source is VARYING:
        return [(Move.PART_VARYING, wanted)] if isinstance(wanted, Part) else None
    if isinstance(source, Part):
        return _from_part(source, wanted, sizes, ranks)
    if source is PARTIAL:
        return _from_partial(wanted)
    first = {VARYING: Move.ENTER, PARTIAL: Move.FIRST}.get(wanted, Move.PART)  # type: ignore[arg-type]
    return [(first, wanted)]


def _between_orders(wanted: Form, source: Order | None, reached: Order | None) -> list[Step] | None:
    if source is None or reached is None or (source.ends, source.part) != (reached.ends, reached.part):
        return None
    move = _BETWEEN.get((source.standing, reached.standing))
    return None if move is None else [(move, wanted)]


_BETWEEN = {
    (Standing.GROUPED, Standing.DISPATCHED): Move.DISPATCH,
    (Standing.DISPATCHED, Standing.GROUPED): Move.COMBINE,
    (Standing.ENDS, Standing.DISPATCHED_ENDS): Move.DISPATCH_ENDS,
}


def _from_partial(wanted: Form) -> list[Step]:
    if isinstance(wanted, Part):
        return [(Move.SCATTER_SUM, wanted)]
    whole: Step = (Move.LEAVE, REPLICATED)
    return [whole] if wanted is REPLICATED else [whole, (Move.ENTER, VARYING)]


def _from_part(source: Part, wanted: Form, sizes: tuple[int, ...], ranks: int) -> list[Step]:
    if wanted is VARYING:
        return [(Move.GATHER_VARYING, VARYING)]
    is_even = all(_is_even(form, sizes, ranks) for form in (source, wanted) if isinstance(form, Part))
    if isinstance(wanted, Part) and source.dim != wanted.dim and is_even:
        return [(Move.ALL_TO_ALL, wanted)]
    whole: Step = (Move.GATHER, REPLICATED)
    if wanted is REPLICATED:
        return [whole]
    return [whole, (Move.PART if isinstance(wanted, Part) else Move.FIRST, wanted)]


def _is_even(part: Part, sizes: tuple[int, ...], ranks: int) -> bool:
    """Whether it is one block of equal parts."""
    return part.blocks == 1 and part.chunk * ranks == sizes[part.dim]
