"""Hardware: presets, files, and what is said of values that are none."""

import json
import math
from pathlib import Path

import pytest
import tomli_w
import torch
import yaml

from graphopt.cost.hardware import PRESETS, Hardware, Link, find_hardware
from graphopt.errors import GraphoptError

H100 = PRESETS["h100-sxm"]
APART = {"base": "h100-sxm", "links": {"dp": {"bandwidth": 50e9, "latency": 1e-5}}}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_found_and_survive_the_way_through_plain_values(name: str) -> None:
    hardware = find_hardware(name)
    assert hardware.name == name
    assert Hardware.from_dict(json.loads(json.dumps(hardware.to_dict()))) == hardware


def test_rates_of_dtypes_and_links_of_axes() -> None:
    hardware = Hardware.from_dict(APART)
    assert hardware.peak(torch.bfloat16) == 989e12
    assert hardware.peak(torch.int64) == hardware.peak(torch.float32) == 67e12
    assert hardware.link_of("dp") == Link(50e9, 1e-5)
    assert hardware.link_of("tp") == H100.link
    assert hardware.memory_bytes == H100.memory_bytes


@pytest.mark.parametrize(
    ("suffix", "dump"), [(".json", json.dumps), (".yaml", yaml.safe_dump), (".toml", tomli_w.dumps)]
)
def test_files(tmp_path: Path, suffix: str, dump) -> None:
    path = tmp_path / f"cluster{suffix}"
    path.write_text(dump({**APART, "name": "cluster", "memory_bytes": "64GiB", "launch_seconds": "2e-6"}))
    hardware = find_hardware(str(path))
    assert (hardware.name, hardware.memory_bytes, hardware.launch_seconds) == ("cluster", 64 << 30, 2e-6)
    assert hardware.link_of("dp").bandwidth == 50e9


def test_an_ideal_link_is_a_link() -> None:
    assert Link(math.inf, 0).bandwidth == math.inf


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base": "h100"}, "there is no hardware 'h100'; the nearest is 'h100-sxm'"),
        ({**APART, "memory_byte": 1}, "hardware has no field 'memory_byte'; the nearest is 'memory_bytes'"),
        ({**APART, "flops": {"bfloat": 1e12}}, "flops names no dtype 'bfloat'; the nearest is 'bfloat16'"),
        ({**APART, "flops": {"bfloat16": 1e12}}, "flops has no float32"),
        ({**APART, "link": {"bandwith": 1e9}}, "link has no field 'bandwith'; the nearest is 'bandwidth'"),
        ({**APART, "links": {"dp": {"bandwidth": 1e9}}}, "links.dp has no latency"),
        ({**APART, "links": 3}, "links=3 is not a mapping"),
        ({**APART, "memory_bandwidth": 0}, "memory_bandwidth=0 is out of range; it must be positive"),
        ({**APART, "launch_seconds": -1.0}, "launch_seconds=-1.0 is out of range; it must be zero or more"),
        ({**APART, "memory_bytes": "much"}, "memory_bytes='much' is not a number"),
        ({**APART, "memory_bytes": math.inf}, "memory_bytes=inf is not a number of bytes"),
        ({"name": "mine", "flops": {"float32": 1e12}}, "hardware has no memory_bandwidth, memory_bytes"),
        ([], r"hardware=\[\] is not a mapping"),
    ],
)
def test_what_is_no_hardware_is_told_apart(values, said: str) -> None:
    with pytest.raises(GraphoptError, match=said):
        Hardware.from_dict(values)


def test_files_that_are_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("name =")
    with pytest.raises(GraphoptError, match="does not parse"):
        find_hardware(str(broken))
    with pytest.raises(GraphoptError, match="cannot be read"):
        find_hardware(str(tmp_path / "missing.yaml"))
