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


@dataclass(frozen=True)
class Order:
    """In which order a rank has the rows of its part, where that is not the order of the whole.

    of: what made it, if not all values that are cut so stand alike. has_gaps: there may be rows that are none of the
    whole's, which no sum may count.
    """

    name: str
    of: Hashable = None
    has_gaps: bool = False


@dataclass(frozen=True)
class Part:
    """Dimension `dim` is cut into `blocks` equal blocks, and each block into parts of `chunk`, one for each rank.

    Where ranks times `chunk` exceed a block, the last part is filled up with zeros. order: None for that of the whole.
    """

    dim: int
    blocks: int
    chunk: int
    order: Order | None = None


BALANCED = Order("balanced")  # of chunks from both ends, as `ir.context` has them; ranks times `chunk` is a block

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

    def __init__(self, title: str, forward: str, backward: str) -> None:
        self.title = title
        self.forward = forward
        self.backward = backward


Step = tuple[Move, Form]  # and the form that it leads to


def moves(source: Form, wanted: Form, sizes: tuple[int, ...], ranks: int) -> list[Step] | None:
    """The steps from one form of a value of `sizes` to another; None if no steps lead there."""
    if source == wanted:
        return []
    if any(isinstance(form, Part) and form.order not in (None, BALANCED) for form in (source, wanted)):
        return None
    if source is VARYING:
        return [(Move.PART_VARYING, wanted)] if isinstance(wanted, Part) else None
    if isinstance(source, Part):
        return _from_part(source, wanted, sizes, ranks)
    if source is PARTIAL:
        return _from_partial(wanted)
    first = {VARYING: Move.ENTER, PARTIAL: Move.FIRST}.get(wanted, Move.PART)  # type: ignore[arg-type]
    return [(first, wanted)]


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
