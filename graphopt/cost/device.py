"""Which hardware a device is."""

import logging

import torch

from graphopt.cost.hardware import PRESETS, Hardware, find_hardware

_DEFAULT = "h100-sxm"
_log = logging.getLogger("graphopt")


def hardware_of(device: torch.device, name: str | None = None) -> Hardware:
    """The hardware called `name` (as in `find_hardware`), or the preset of `device`; a GPU for one that is only meta.

    A GPU that no preset describes is taken for the default one, and a line in the log says so.
    """
    if name is not None:
        return find_hardware(name)
    if device.type == "cpu":
        return PRESETS["cpu"]
    if device.type == "cuda":
        called = torch.cuda.get_device_name(device)
        for preset in PRESETS.values():
            if preset.name.partition("-")[0].upper() in called.upper():
                return preset
        _log.warning("there is no preset for %s: times are those of %s; name another as hardware", called, _DEFAULT)
    return PRESETS[_DEFAULT]
