"""What the user asks for: a frozen plan, checked before anything is captured."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import PlanError
from graphopt.nearest import nearest
from graphopt.plan.checks import Frozen, require_bool, require_choice, require_int
from graphopt.plan.sections import Dispatch, Offload, Precision, Remat, Stages, Tensor, Zero
from graphopt.plan.text import AXES, MAIN, format_plan, load_plan, parse_plan, save_plan
from graphopt.sizes import format_size

__all__ = ["Dispatch", "Offload", "Plan", "Precision", "Remat", "Stages", "Tensor", "Zero"]

_DYNAMIC = {"batch": 0, "sequence": 1}


@dataclass(frozen=True)
class Plan:
    """How a model runs on many devices.

    mesh: axis name -> ranks; one that is None or -1 is inferred from the world. Axes are laid over the ranks in the
        order written, the first varying slowest. Known axes: ``dp`` (data parallel; one
        rank if it is left out beside others), and those that split layers: ``tp`` (tensor parallel), ``sp`` (sequence
        parallel), ``cp`` (context parallel) and ``ep`` (expert parallel); and ``pp`` (pipeline parallel), which cuts
        between layers.
    zero: a stage, or `Zero`.
    tensor: how layers are split over ``tp``, as a `Tensor`.
    dispatch: how tokens go to the ranks of ``ep`` that have their experts, as a `Dispatch`.
    pipeline: how it is cut into stages over ``pp``, and how a step's microbatches go through them: the name of a
        schedule, or `Stages`.
    precision: None for that of the model, ``"bf16"``, or `Precision`.
    remat: None to save what backward reads, ``"full"``, ``"selective"``, a budget such as ``"8GiB"`` or ``0.5``, or
        `Remat`.
    offload: None to keep what backward reads where it was made, ``"host"``, ``"disk"``, or `Offload`.
    dynamic: which sizes of batch tensors stay symbolic: None, ``"batch"`` (dimension 0), ``"sequence"`` (1),
        ``"batch,sequence"``, or a mapping from argument names to dimensions.
    passes: a textual pipeline in place of the one that the plan implies.
    kernels: ``"off"`` to compute what a model spells out as it is spelled; ``"auto"`` to put operators with a kernel in
        its place, where one takes it; or the variant that is to compute these: ``"triton"``, ``"cuda"`` (native code)
        or ``"reference"``. The variable ``GRAPHOPT_KERNELS``, where it is set, stands in the place of this field.
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
    tensor: Tensor = field(default_factory=Tensor)
    dispatch: Dispatch = field(default_factory=Dispatch)
    pipeline: Stages = field(default_factory=Stages)
    precision: Precision | None = None
    remat: Remat | None = None
    offload: Offload | None = None
    dynamic: str | Mapping[str, tuple[int, ...]] | None = None
    passes: str | None = None
    kernels: str = "off"
    executor: str = "python"
    transport: str = "auto"
    batch_norm: str = "local"
    hardware: str | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "mesh", _checked_mesh(self.mesh))
        object.__setattr__(self, "zero", _section("zero", Zero, self.zero))
        object.__setattr__(self, "tensor", _section("tensor", Tensor, self.tensor))
        object.__setattr__(self, "dispatch", _section("dispatch", Dispatch, self.dispatch))
        object.__setattr__(self, "pipeline", _section("pipeline", Stages, self.pipeline))
        if self.precision is not None:
            object.__setattr__(self, "precision", _section("precision", Precision, self.precision))
        if self.remat is not None:
            object.__setattr__(self, "remat", _section("remat", Remat, self.remat))
        if self.offload is not None:
            object.__setattr__(self, "offload", _section("offload", Offload, self.offload))
        object.__setattr__(self, "dynamic", _checked_dynamic(self.dynamic))
        if self.passes is not None and not isinstance(self.passes, str):
            raise PlanError(f"passes={self.passes!r} is not text; write it as 'canonicalize,differentiate'")
        require_choice("kernels", self.kernels, ("off", "auto", "reference", "triton", "cuda"))
        require_choice("executor", self.executor, ("python", "inductor"))
        if self.executor == "inductor" and self.offload is not None:
            raise PlanError("offload needs executor='python': Inductor's programs hold nothing but tensors")
        require_choice("transport", self.transport, ("auto", "group"))
        require_choice("batch_norm", self.batch_norm, ("local", "global"))
        if self.hardware is not None and not isinstance(self.hardware, str):
            raise PlanError(f"hardware={self.hardware!r} is neither a name nor a file; say for instance 'h100-sxm'")
        require_bool("verify", self.verify)

    if TYPE_CHECKING:

        def __init__(
            self,
            mesh: Mapping[str, int | None] = ...,
            zero: int | Zero | Mapping[str, Any] = 0,
            tensor: Tensor | Mapping[str, Any] = ...,
            dispatch: float | Dispatch | Mapping[str, Any] = ...,
            pipeline: str | Stages | Mapping[str, Any] = ...,
            precision: str | Precision | Mapping[str, Any] | None = None,
            remat: str | int | float | Remat | Mapping[str, Any] | None = None,
            offload: str | Offload | Mapping[str, Any] | None = None,
            dynamic: str | Mapping[str, Sequence[int]] | None = None,
            passes: str | None = None,
            kernels: str = "off",
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

    @property
    def data_parallel_ranks(self) -> int:
        """Ranks of that axis, in a resolved plan."""
        return self.mesh[self.data_parallel_axis]

    @property
    def model_axes(self) -> tuple[str, ...]:
        """The axes that split layers, in order: those of more than one rank beside data and pipeline parallelism."""
        others = (self.data_parallel_axis, self.pipeline_axis)
        return tuple(axis for axis, size in self.mesh.items() if axis not in others and size != 1)

    @property
    def pipeline_axis(self) -> str:
        """The axis over which layers are cut into stages."""
        return "pp"

    @property
    def pipeline_ranks(self) -> int:
        """Ranks of that axis, in a resolved plan."""
        return self.mesh.get(self.pipeline_axis, 1)

    @property
    def gathers_once_a_step(self) -> bool:
        """Whether parameters are shards between the steps of a pipeline, and whole throughout one."""
        return self.zero.stage == 3 and self.pipeline_ranks > 1 and self.pipeline.gather == "step"

    @property
    def microbatches(self) -> int:
        """Parts of the batch that a step goes through, in a resolved plan."""
        asked, ranks = self.pipeline.microbatches, self.pipeline_ranks
        return asked if asked is not None else 4 * ranks if ranks > 1 else 1

    def dynamic_dims_for(self, argument: str, dims: int) -> tuple[int, ...]:
        """The dimensions of a batch tensor that stay symbolic; `argument` is its name, `dims` how many it has."""
        if self.dynamic is None:
            return ()
        if isinstance(self.dynamic, str):
            return tuple(d for word, d in _DYNAMIC.items() if word in self.dynamic.split(",") and d < dims)
        return tuple(d for d in self.dynamic.get(argument, ()) if d < dims)

    def resolve(self, world: int) -> "Plan":
        """The plan with every mesh size known, that of `data_parallel_axis` among them.

        Raises PlanError if its mesh does not cover `world` ranks.
        """
        sizes = dict(self.mesh) or {self.data_parallel_axis: -1}
        if self.data_parallel_axis not in sizes:
            sizes = {self.data_parallel_axis: 1, **sizes}
        known = math.prod(max(size, 1) for size in sizes.values())
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
            why = "is larger than" if known > world else "does not cover"
            raise PlanError(
                f"mesh={dict(self.mesh)} has {known} ranks and {why} the world of {world}; "
                f"the nearest valid choice is {_fitting(sizes, world)}"
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


def _fitting(sizes: Mapping[str, int], world: int) -> str:
    """The size of one axis with which a mesh covers the world, or the world that it covers."""
    ranks = math.prod(sizes.values())
    for axis, size in sizes.items():
        if world % (ranks // size) == 0:
            return f"{axis}={world // (ranks // size)}"
    return f"a world of {ranks}"


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
        values[spec.name] = _plain_section(spec.name, value) if dataclasses.is_dataclass(value) else _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _plain_section(name: str, section: Any) -> Any:
    """Its main field, if it has one, with those that are not as by default; the value alone if there are none."""
    main, default = MAIN.get(name), type(section)()
    values = {
        spec.name: _plain_field(spec, getattr(section, spec.name))
        for spec in dataclasses.fields(section)
        if spec.name == main or getattr(section, spec.name) != getattr(default, spec.name)
    }
    return values[main] if main is not None and len(values) == 1 else values


def _plain_field(spec: "dataclasses.Field[Any]", value: Any) -> Any:
    text = format_size(value) if "bytes" in spec.metadata and isinstance(value, int) else ""
    return text if text and not text.isdecimal() else _plain(value)


def _section(name: str, kind: type, value: Any) -> Any:
    """A part of the plan from itself, from a mapping, or from the value of its main field."""
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        _require_fields(f"{name}.", kind, value)
        return kind(**value)
    if name not in MAIN:
        field_name = dataclasses.fields(kind)[0].name
        raise PlanError(f"{name}={value!r} is no section; name its fields, as in {name}.{field_name}={value}")
    return kind(**{MAIN[name]: value})


def _checked_mesh(mesh: Any) -> Frozen[int]:
    if not isinstance(mesh, Mapping):
        raise PlanError(f"mesh={mesh!r} is not a mapping of axis names to sizes; write {{'dp': 2}}")
    sizes = {axis: -1 if size is None else size for axis, size in mesh.items()}
    for axis, size in sizes.items():
        if axis not in AXES:
            raise PlanError(f"mesh has an unknown axis {axis!r}; {nearest(str(axis), AXES)}")
        if size != -1:
            require_int(f"mesh.{axis}", size, 1)
    return Frozen(sizes)


def _checked_dynamic(dynamic: Any) -> Any:
    if dynamic is None or dynamic == "":
        return None
    if isinstance(dynamic, str):
        words = {word.strip() for word in dynamic.split(",")}
        for word in words:
            require_choice("dynamic", word, tuple(_DYNAMIC))
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


def _require_fields(prefix: str, kind: type, values: Mapping[str, Any]) -> None:
    known = tuple(spec.name for spec in dataclasses.fields(kind))
    for name in values:
        if name not in known:
            choices = known if prefix else (*known, *AXES)
            raise PlanError(f"a plan has no field {prefix}{name}; {nearest(str(name), choices, prefix)}")
