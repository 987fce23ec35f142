"""What a rank runs on: peak rates, memory and links.

Presets have the rates of NVIDIA's data sheets for the A100 80GB, H100 and H200 Tensor Core GPUs (SXM). No program
reaches such peaks, so what is computed with them bounds its times from below; a file can say what was measured.
"""

import dataclasses
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from graphopt.errors import GraphoptError
from graphopt.nearest import nearest
from graphopt.sizes import parse_size

_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
_READERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".json": json.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}


@dataclass(frozen=True)
class Link:
    """How a rank reaches the others of a mesh axis.

    bandwidth: bytes/s that it sends, while it receives as many. latency: seconds that a message takes beside its bytes.
    """

    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", _number("a link's bandwidth", self.bandwidth, positive=True))
        object.__setattr__(self, "latency", _number("a link's latency", self.latency))


@dataclass(frozen=True)
class Hardware:
    """One rank's device, and its links to the others and to memory elsewhere.

    flops: peak FLOP/s of matrix multiplication by dtype name; a dtype that is not named counts as float32.
    memory_bandwidth: bytes/s that operations read and write. memory_bytes: what the device holds.
    launch_seconds: what every operation takes beside its work.
    link: of every mesh axis that is not named in `links`.
    allocation_bytes: what the device's allocator rounds sizes up to: 512 in PyTorch's for CUDA (`kMinBlockSize` in
        c10/cuda), whose blocks above 1 MiB may be up to 1 MiB larger still, where the rest of one is not split off.
    host, disk: how the device reaches the host's memory and files, in each direction.
    shares_host: whether the host's memory is the device's own, as a CPU's is.
    Numbers may be text (``"3.35e12"``, ``"80GiB"``). Raises GraphoptError for a value that is no such number.
    """

    name: str
    flops: Mapping[str, float]
    memory_bandwidth: float
    memory_bytes: int
    launch_seconds: float
    link: Link
    links: Mapping[str, Link] = field(default_factory=dict)
    allocation_bytes: int = 512
    host: Link = field(default_factory=lambda: Link(25e9, 1e-5))
    disk: Link = field(default_factory=lambda: Link(2e9, 1e-4))
    shares_host: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "flops", MappingProxyType(_checked_flops(self.flops)))
        for name in ("link", "host", "disk"):
            object.__setattr__(self, name, _as_link(name, getattr(self, name)))
        links = {axis: _as_link(f"links.{axis}", link) for axis, link in _mapping("links", self.links).items()}
        object.__setattr__(self, "links", MappingProxyType(links))
        bandwidth = _number("memory_bandwidth", self.memory_bandwidth, positive=True)
        object.__setattr__(self, "memory_bandwidth", bandwidth)
        object.__setattr__(self, "launch_seconds", _number("launch_seconds", self.launch_seconds))
        object.__setattr__(self, "memory_bytes", _bytes("memory_bytes", self.memory_bytes))
        object.__setattr__(self, "allocation_bytes", _bytes("allocation_bytes", self.allocation_bytes))
        if not isinstance(self.shares_host, bool):
            raise GraphoptError(f"shares_host={self.shares_host!r} is not a truth value; say true or false")

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix multiplication in `dtype`."""
        return self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])

    def link_of(self, axis: str) -> Link:
        """The link over which collectives of a mesh axis run."""
        return self.links.get(axis, self.link)

    def link_to(self, place: str) -> Link:
        """The link over which copies to and from ``host`` or ``disk`` travel."""
        return {"host": self.host, "disk": self.disk}[place]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Hardware":
        """From nested plain values, the inverse of `to_dict`; with ``base``, the preset in which they replace fields.

        ``{"base": "h100-sxm", "links": {"dp": {"bandwidth": 50e9, "latency": 1e-5}}}`` is a preset whose ranks are on
        machines of their own. Raises GraphoptError for an unknown or a missing field.
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        given = dict(_mapping("hardware", values))
        base = given.pop("base", None)
        _require_known("hardware", given, [*known, "base"])
        if base is not None:
            return dataclasses.replace(_preset(str(base)), **given)
        missing = [spec.name for spec in dataclasses.fields(cls) if _is_required(spec) and spec.name not in given]
        if missing:
            raise GraphoptError(f"hardware has no {', '.join(missing)}; give it, or a base to take it from")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        links = {axis: dataclasses.asdict(link) for axis, link in self.links.items()}
        single = {name: dataclasses.asdict(getattr(self, name)) for name in ("link", "host", "disk")}
        return {**values, **single, "flops": dict(self.flops), "links": links}


def find_hardware(name: str) -> Hardware:
    """A preset (``h100-sxm``, ``h200-sxm``, ``a100-80gb-sxm``, ``cpu``), or what a .toml, .yaml or .json file holds.

    Raises GraphoptError, with the nearest valid choice, for a name that is none and a file that cannot be read.
    """
    path = Path(name)
    if path.suffix not in _READERS:
        return _preset(name)
    try:
        values = _READERS[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraphoptError(f"the hardware {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise GraphoptError(f"the hardware {path} does not parse: {' '.join(str(error).split())}") from error
    return Hardware.from_dict(values)


def _preset(name: str) -> Hardware:
    if name not in PRESETS:
        raise GraphoptError(f"there is no hardware {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def _is_required(spec: "dataclasses.Field[Any]") -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _require_known(what: str, values: Mapping[str, Any], known: list[str]) -> None:
    for name in values:
        if name not in known:
            raise GraphoptError(f"{what} has no field {name!r}; {nearest(str(name), known)}")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise GraphoptError(f"{name}={value!r} is not a mapping of names to values")
    return value


def _checked_flops(values: Any) -> dict[str, float]:
    """Peak rates by dtype name."""
    for name in _mapping("flops", values):
        if name not in _DTYPES:
            raise GraphoptError(f"flops names no dtype {name!r}; {nearest(str(name), _DTYPES)}")
    if "float32" not in values:
        raise GraphoptError("flops has no float32, by which other dtypes are measured")
    return {name: _number(f"flops.{name}", value, positive=True) for name, value in values.items()}


def _as_link(name: str, value: Any) -> Link:
    if isinstance(value, Link):
        return value
    fields = [spec.name for spec in dataclasses.fields(Link)]
    _require_known(name, _mapping(name, value), fields)
    missing = [key for key in fields if key not in value]
    if missing:
        raise GraphoptError(f"{name} has no {', '.join(missing)}")
    return Link(**value)


def _bytes(name: str, value: Any) -> int:
    size = _number(name, value, positive=True)
    if not float(size).is_integer():
        raise GraphoptError(f"{name}={value!r} is not a number of bytes; write for instance 80GiB")
    return int(size)


def _number(name: str, value: Any, *, positive: bool = False) -> float:
    """A number from itself or from text (YAML takes 1e9 for text)."""
    given = value
    if isinstance(value, str):
        size = parse_size(value)
        try:
            given = float(value) if size is None else size
        except ValueError:
            given = None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or math.isnan(given):
        raise GraphoptError(f"{name}={value!r} is not a number; write for instance 1e9 or 8GiB")
    if given < 0 or (positive and given == 0):
        raise GraphoptError(
            f"{name}={value!r} is out of range; it must be {'positive' if positive else 'zero or more'}"
        )
    return given


# Rates are dense: half of those "with sparsity". float32 is without TF32, as PyTorch multiplies by default. NVLink's
# bandwidth is halved, as that of PCIe, for they are given as the sum of both directions. No data sheet has latencies:
# those of launches and messages are of the order of magnitude that is seen with CUDA and NCCL; nor has it the disk.
_HOPPER = {
    "float64": 67e12,
    "float32": 67e12,
    "bfloat16": 989e12,
    "float16": 989e12,
    "float8_e4m3fn": 1979e12,
    "float8_e5m2": 1979e12,
    "int8": 1979e12,
}
_AMPERE = {"float64": 19.5e12, "float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12, "int8": 624e12}
# PyTorch aligns memory of the CPU to 64 bytes (`gAlignment` in c10/core/alignment.h), so blocks are as far apart.
# Two cores at 3 GHz with two 256-bit multiply-adds a cycle, on one channel of DDR4-3200; ranks share the memory.
_PCIE5 = Link(64e9, 1e-5)
_CPU = {"float64": 96e9, "float32": 192e9}
PRESETS: Mapping[str, Hardware] = MappingProxyType(
    {
        hardware.name: hardware
        for hardware in (
            Hardware("h100-sxm", _HOPPER, 3.35e12, 80 << 30, 4e-6, Link(450e9, 5e-6), host=_PCIE5),
            Hardware("h200-sxm", _HOPPER, 4.8e12, 141 << 30, 4e-6, Link(450e9, 5e-6), host=_PCIE5),
            Hardware("a100-80gb-sxm", _AMPERE, 2.039e12, 80 << 30, 5e-6, Link(300e9, 5e-6), host=Link(32e9, 1e-5)),
            Hardware(
                "cpu",
                _CPU,
                25.6e9,
                16 << 30,
                5e-6,
                Link(10e9, 2e-5),
                allocation_bytes=64,
                host=Link(10e9, 1e-5),
                shares_host=True,
            ),
        )
    }
)
