"""Random numbers that differ between data-parallel ranks and leave the user's generator in step."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def rank_generator(rank: int, ranks: int, device: torch.device) -> Iterator[None]:
    """Draw from a stream of this rank's own, seeded by one draw from the default generator.

    With one rank nothing changes: the program draws what eager would. Otherwise the default generators of all ranks,
    if seeded alike, stay alike.
    """
    if ranks == 1:
        yield
        return
    seed = int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed + rank)
        yield


class GeneratorState:
    """The state of the default generators, to run a program once more with the same draws."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """The state of then inside; that of now again afterwards."""
        now = GeneratorState(self._device)
        self._restore()
        try:
            yield
        finally:
            now._restore()

    def _restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            torch.get_device_module(self._device).set_rng_state(self._own, self._device)
