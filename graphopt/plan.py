"""What the user asks for: a frozen plan, checked before anything is captured."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from graphopt.errors import PlanError
from graphopt.nearest import nearest
from graphopt.plan_text import AXES, MAIN, format_plan, load_plan, parse_plan, save_plan
from graphopt.sizes import format_size, parse_size

T = TypeVar("T")
_BYTES = {"bytes": True}
_SEPARATORS = frozenset(",|{}= \t\n")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_POLICIES = ("full", "selective")
_PLACES = ("host", "disk")
_DYNAMIC = {"batch": 0, "sequence": 1}


class Frozen(Mapping[str, T]):
    """An ordered mapping that does not change, so that a plan can be hashed; the order counts when two are compared."""

    def __init__(self, items: Mapping[str, T] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Frozen):
            return tuple(self._items.items()) == tuple(other._items.items())
        return self._items == other

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Zero:
    """ZeRO over the data-parallel axis (Rajbhandari et al. 2020).

    stage: 0 shards nothing, 1 optimizer state, 2 also gradients, 3 also parameters.
    bucket_bytes: of whole parameters that one collective moves at most, or text such as ``"8MiB"``; None for those of
        a repeated layer.
    prefetch: buckets gathered ahead of the one in use.
    whole_below: parameters of fewer bytes stay whole on every rank; text such as ``"4KiB"`` will do.
    keep_gathered: what stays gathered between forward and backward in stage 3: nothing, everything (True), or the
        parameters whose names match one of the patterns (as in fnmatch).
    """

    stage: int = 3
    bucket_bytes: int | None = field(default=None, metadata=_BYTES)
    prefetch: int = 1
    whole_below: int = field(default=4096, metadata=_BYTES)
    keep_gathered: bool | tuple[str, ...] = False

    def __post_init__(self) -> None:
        _require_int("zero.stage", self.stage, 0, 3)
        if self.bucket_bytes is not None:
            object.__setattr__(self, "bucket_bytes", _checked_bytes("zero.bucket_bytes", self.bucket_bytes, 1))
        _require_int("zero.prefetch", self.prefetch, 0)
        object.__setattr__(self, "whole_below", _checked_bytes("zero.whole_below", self.whole_below, 0))
        object.__setattr__(self, "keep_gathered", _checked_patterns("zero.keep_gathered", self.keep_gathered))

    if TYPE_CHECKING:  # what may be written; the fields say what is held

        def __init__(
            self,
            stage: int = 3,
            bucket_bytes: int | str | None = None,
            prefetch: int = 1,
            whole_below: int | str = 4096,
            keep_gathered: bool | str | Sequence[str] = False,
        ) -> None: ...


@dataclass(frozen=True)
class Precision:
    """The dtype in which parameters compute, and that in which gradients are summed; they are stored as they are."""

    compute: str = "bf16"
    reduce: str = "fp32"

    def __post_init__(self) -> None:
        if self.compute in ("fp16", "float16", "half"):
            raise PlanError(
                f"precision.compute={self.compute!r} needs loss scaling, which this version does not have; say 'bf16'"
            )
        _require_choice("precision.compute", self.compute, tuple(_DTYPES))
        _require_choice("precision.reduce", self.reduce, tuple(_DTYPES))

    @property
    def compute_dtype(self) -> torch.dtype:
        return _DTYPES[self.compute]

    @property
    def reduce_dtype(self) -> torch.dtype:
        return _DTYPES[self.reduce]


@dataclass(frozen=True)
class Remat:
    """What backward computes again in place of saving it (Chen et al. 2016).

    policy: ``"full"`` saves the inputs of each repeated layer alone; ``"selective"`` also what matrix products,
        convolutions and attention give. Or a budget, kept at the least cost in time: bytes that the step may hold at
        its peak on a rank (a whole number, or text such as ``"8GiB"``), or the share of what it saves for backward
        that it may go on saving (from 0.0 to 1.0). Optimizer state is not part of the step.
    keep: patterns of module paths (as in fnmatch) whose values are saved in any case.
    keep_ops: patterns of operators, such as ``aten.mm.*``, whose values are saved in any case.
    """

    policy: str | int | float = field(default="full", metadata=_BYTES)
    keep: tuple[str, ...] = ()
    keep_ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", _checked_policy(self.policy))
        for name in ("keep", "keep_ops"):
            patterns = _checked_patterns(f"remat.{name}", getattr(self, name))
            if isinstance(patterns, bool):
                raise PlanError(f"remat.{name}={patterns} is no list of patterns; write for instance 'layers.0.*'")
            object.__setattr__(self, name, patterns)

    @property
    def budget(self) -> int | float | None:
        """Bytes (int) or a share (float), if that is what it is."""
        return None if isinstance(self.policy, str) else self.policy

    if TYPE_CHECKING:

        def __init__(
            self, policy: str | int | float = "full", keep: str | Sequence[str] = (), keep_ops: str | Sequence[str] = ()
        ) -> None: ...


@dataclass(frozen=True)
class Offload:
    """What is kept out of the device's memory while nothing computes with it.

    place: ``"host"``, the memory of the CPU, or ``"disk"``, files.
    least_bytes: what is smaller stays; text such as ``"1MiB"`` will do.
    folder: where files go, best on a disk of this machine; None for the system's folder of temporary files.
    activations: whether values that forward saves for backward are. With a budget in `Plan.remat`, those are moved
        that it takes to keep it, else all.
    state: whether parameters (the shards, where there are) and their gradients are. An optimizer's state is where its
        parameters are; `graphopt.offload.DiskAdamW` has files for it.
    """

    place: str = "host"
    least_bytes: int = field(default=1 << 20, metadata=_BYTES)
    folder: str | None = None
    activations: bool = True
    state: bool = False

    def __post_init__(self) -> None:
        _require_choice("offload.place", self.place, _PLACES)
        for name in ("activations", "state"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"offload.{name}={getattr(self, name)!r} is not a truth value; say true or false")
        object.__setattr__(self, "least_bytes", _checked_bytes("offload.least_bytes", self.least_bytes, 0))
        if self.folder is not None:
            if not isinstance(self.folder, (str, os.PathLike)):
                raise PlanError(f"offload.folder={self.folder!r} is no path; write one such as '/scratch'")
            object.__setattr__(self, "folder", os.fspath(self.folder))

    if TYPE_CHECKING:

        def __init__(
            self,
            place: str = "host",
            least_bytes: int | str = 1 << 20,
            folder: str | os.PathLike[str] | None = None,
            activations: bool = True,
            state: bool = False,
        ) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How a model runs on many devices.

    mesh: axis name -> ranks; one that is None or -1 is inferred from the world. Axes are laid over the ranks in the
        order written, the first varying slowest. Known axes: ``dp`` (data parallel).
    zero: a stage, or `Zero`.
    precision: None for that of the model, ``"bf16"``, or `Precision`.
    remat: None to save what backward reads, ``"full"``, ``"selective"``, a budget such as ``"8GiB"`` or ``0.5``, or
        `Remat`.
    offload: None to keep what backward reads where it was made, ``"host"``, ``"disk"``, or `Offload`.
    dynamic: which sizes of batch tensors stay symbolic: None, ``"batch"`` (dimension 0), ``"sequence"`` (1),
        ``"batch,sequence"``, or a mapping from argument names to dimensions.
    passes: a textual pipeline in place of the one that the plan implies.
    executor: what runs the emitted halves, ``"python"`` or ``"inductor"``.
    transport: how ranks exchange: ``"auto"`` through shared memory where those of an axis run on one machine's CPU,
        otherwise as ``"group"``, by the process group's own collectives.
    batch_norm: statistics over the rank's part of the batch (``"local"``) or over all of it (``"global"``).
    hardware: what a rank runs on, by which times are reckoned: a preset such as ``"h100-sxm"``, or a file that says it;
        None for what the model's device is.
    verify: check the program after every pass, and the emitted source; about a tenth of the time of a compilation.
    Raises PlanError for what cannot be, naming field, value and the nearest valid choice.
    """

    mesh: Mapping[str, int] = field(default_factory=Frozen)
    zero: Zero = field(default_factory=lambda: Zero(0))
    precision: Precision | None = None
    remat: Remat | None = None
    offload: Offload | None = None
    dynamic: str | Mapping[str, tuple[int, ...]] | None = None
    passes: str | None = None
    executor: str = "python"
    transport: str = "auto"
    batch_norm: str = "local"
    hardware: str | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "mesh", _checked_mesh(self.mesh))
        object.__setattr__(self, "zero", _section("zero", Zero, self.zero))
        if self.precision is not None:
            object.__setattr__(self, "precision", _section("precision", Precision, self.precision))
        if self.remat is not None:
            object.__setattr__(self, "remat", _section("remat", Remat, self.remat))
        if self.offload is not None:
            object.__setattr__(self, "offload", _section("offload", Offload, self.offload))
        object.__setattr__(self, "dynamic", _checked_dynamic(self.dynamic))
        if self.passes is not None and not isinstance(self.passes, str):
            raise PlanError(f"passes={self.passes!r} is not text; write it as 'canonicalize,differentiate'")
        _require_choice("executor", self.executor, ("python", "inductor"))
        if self.executor == "inductor" and self.offload is not None:
            raise PlanError("offload needs executor='python': Inductor's programs hold nothing but tensors")
        _require_choice("transport", self.transport, ("auto", "group"))
        _require_choice("batch_norm", self.batch_norm, ("local", "global"))
        if self.hardware is not None and not isinstance(self.hardware, str):
            raise PlanError(f"hardware={self.hardware!r} is neither a name nor a file; say for instance 'h100-sxm'")
        if not isinstance(self.verify, bool):
            raise PlanError(f"verify={self.verify!r} is not a truth value; say true or false")

    if TYPE_CHECKING:

        def __init__(
            self,
            mesh: Mapping[str, int | None] = ...,
            zero: int | Zero | Mapping[str, Any] = 0,
            precision: str | Precision | Mapping[str, Any] | None = None,
            remat: str | int | float | Remat | Mapping[str, Any] | None = None,
            offload: str | Offload | Mapping[str, Any] | None = None,
            dynamic: str | Mapping[str, Sequence[int]] | None = None,
            passes: str | None = None,
            executor: str = "python",
            transport: str = "auto",
            batch_norm: str = "local",
            hardware: str | None = None,
            verify: bool = True,
        ) -> None: ...

    @property
    def data_parallel_axis(self) -> str:
        """The axis that shards batch, gradients and parameters."""
        return "dp"

    def dynamic_dims_for(self, argument: str, dims: int) -> tuple[int, ...]:
        """The dimensions of a batch tensor that stay symbolic; `argument` is its name, `dims` how many it has."""
        if self.dynamic is None:
            return ()
        if isinstance(self.dynamic, str):
            return tuple(d for word, d in _DYNAMIC.items() if word in self.dynamic.split(",") and d < dims)
        return tuple(d for d in self.dynamic.get(argument, ()) if d < dims)

    def resolve(self, world: int) -> "Plan":
        """The plan with every mesh size known. Raises PlanError if its mesh does not cover `world` ranks."""
        sizes = dict(self.mesh) or {"dp": -1}
        known = 1
        for size in sizes.values():
            known *= max(size, 1)
        for axis, size in sizes.items():
            if size == -1:
                if world % known:
                    raise PlanError(
                        f"mesh={sizes}: {axis} cannot be inferred, {known} does not divide the world of {world} ranks; "
                        f"the nearest world is {known * max(1, round(world / known))}"
                    )
                sizes[axis] = world // known
                known = world
        if known != world:
            axis = next(iter(sizes))
            fitting = max(1, sizes[axis] * world // known)
            why = "is larger than" if known > world else "does not cover"
            raise PlanError(
                f"mesh={sizes} has {known} ranks and {why} the world of {world}; "
                f"the nearest valid choice is {axis}={fitting}"
            )
        return dataclasses.replace(self, mesh=Frozen(sizes))

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """The plan that text such as ``dp=4,zero=3,zero.bucket_bytes=8MiB`` describes; `str` is the inverse."""
        return from_dict(parse_plan(text))

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """A plan from a .yaml, .yml, .json or .toml file."""
        return from_dict(load_plan(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write the plan to a .yaml, .yml, .json or .toml file."""
        save_plan(to_dict(self), Path(path))

    def __str__(self) -> str:
        return format_plan(to_dict(self))


def from_dict(values: Mapping[str, Any]) -> Plan:
    """A plan from nested plain values. Raises PlanError for an unknown field."""
    _require_fields("", Plan, values)
    return Plan(**values)


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as nested plain values; what is as by default is left out."""
    default = Plan()
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(Plan):
        value = getattr(plan, spec.name)
        if value == getattr(default, spec.name):
            continue
        values[spec.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_section(value)
    return value


def _plain_section(section: Any) -> Any:
    """Its main field, with those that are not as by default; the value alone if there are none."""
    main, *others = dataclasses.fields(section)
    values = {main.name: _plain_field(main, getattr(section, main.name))}
    for spec in others:
        value = getattr(section, spec.name)
        if value != spec.default:
            values[spec.name] = _plain_field(spec, value)
    return values if len(values) > 1 else values[main.name]


def _plain_field(spec: "dataclasses.Field[Any]", value: Any) -> Any:
    text = format_size(value) if spec.metadata == _BYTES and isinstance(value, int) else ""
    return text if text and not text.isdecimal() else _plain(value)


def _section(name: str, kind: type, value: Any) -> Any:
    """A part of the plan from itself, from a mapping, or from the value of its main field."""
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        _require_fields(f"{name}.", kind, value)
        return kind(**value)
    return kind(**{MAIN[name]: value})


def _checked_mesh(mesh: Any) -> Frozen[int]:
    if not isinstance(mesh, Mapping):
        raise PlanError(f"mesh={mesh!r} is not a mapping of axis names to sizes; write {{'dp': 2}}")
    sizes = {axis: -1 if size is None else size for axis, size in mesh.items()}
    for axis, size in sizes.items():
        if axis not in AXES:
            raise PlanError(f"mesh has an unknown axis {axis!r}; {nearest(str(axis), AXES)}")
        if size != -1:
            _require_int(f"mesh.{axis}", size, 1)
    return Frozen(sizes)


def _checked_dynamic(dynamic: Any) -> Any:
    if dynamic is None or dynamic == "":
        return None
    if isinstance(dynamic, str):
        words = {word.strip() for word in dynamic.split(",")}
        for word in words:
            _require_choice("dynamic", word, tuple(_DYNAMIC))
        return ",".join(sorted(words, key=_DYNAMIC.__getitem__))
    if isinstance(dynamic, Mapping):
        return Frozen({name: _checked_dims(f"dynamic.{name}", dynamic[name]) for name in sorted(dynamic)})
    raise PlanError(f"dynamic={dynamic!r} is neither text nor a mapping; say 'batch' or {{'input_ids': [0, 1]}}")


def _checked_dims(name: str, dims: Any) -> tuple[int, ...]:
    """Dimensions from a list, whose items are still text where a plan's text was parsed."""
    if isinstance(dims, (tuple, list)):
        found = tuple(int(d) if isinstance(d, str) and d.isdecimal() else d for d in dims)
        if all(type(d) is int and d >= 0 for d in found):
            return found
    raise PlanError(f"{name}={dims!r} is not a list of dimensions; write [0] for the first")


def _checked_patterns(name: str, given: Any) -> bool | tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given
    if isinstance(patterns, bool):
        return patterns
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
        raise PlanError(f"{name}={given!r} is neither true, false nor a list of name patterns; say true")
    for pattern in patterns:
        if not pattern or _SEPARATORS & set(pattern):
            raise PlanError(f"{name} has a pattern {pattern!r} that matches no name; write one such as 'layers.0.*'")
    return patterns


def _checked_policy(given: Any) -> str | int | float:
    """Of rematerialization: a word, bytes, or a share."""
    value: Any = given
    if isinstance(given, str) and given not in _POLICIES:
        value = parse_size(given)
        if value is None:
            try:
                value = float(given)
            except ValueError:
                words = ", ".join(_POLICIES)
                raise PlanError(
                    f"remat.policy={given!r} is not one of {words}, nor a budget such as 8GiB or 0.5; "
                    f"{nearest(given, _POLICIES)}"
                ) from None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise PlanError(f"remat.policy={given!r} is neither a word nor a budget; say 'selective', '8GiB' or 0.5")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise PlanError(f"remat.policy={given!r} is no share; the nearest is {min(max(value, 0.0), 1.0)}")
    if type(value) is int:
        _require_int("remat.policy", value, 1)
    checked: str | int | float = value
    return checked


def _checked_bytes(name: str, given: Any, low: int) -> int:
    """Bytes from a number, or from text such as ``8MiB``."""
    size = parse_size(given) if isinstance(given, str) else given
    if size is None:
        raise PlanError(f"{name}={given!r} is not a size; write bytes, or B, KiB, MiB, GiB or TiB, as in 8MiB")
    _require_int(name, size, low)
    return int(size)


def _require_fields(prefix: str, kind: type, values: Mapping[str, Any]) -> None:
    known = tuple(spec.name for spec in dataclasses.fields(kind))
    for name in values:
        if name not in known:
            choices = known if prefix else (*known, *AXES)
            raise PlanError(f"a plan has no field {prefix}{name}; {nearest(str(name), choices, prefix)}")


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PlanError(f"{name}={value!r} is not one of {', '.join(choices)}; {nearest(str(value), choices)}")


def _require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if type(value) is not int:
        raise PlanError(
            f"{name}={value!r} is not a whole number; the nearest valid choice is {_nearest_int(value, low, high)}"
        )
    if value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise PlanError(
            f"{name}={value} is out of range ({allowed}); the nearest valid choice is {_nearest_int(value, low, high)}"
        )


def _nearest_int(value: Any, low: int, high: int | None) -> int:
    try:
        number = round(float(value))
    except (TypeError, ValueError, OverflowError):
        return low
    return max(low, number if high is None else min(number, high))
