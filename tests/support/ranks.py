"""Real gloo ranks, started once and shared by all tests: starting a process that imports torch takes seconds.

They are forked from a server that has imported it, which is itself started once.
"""

import contextlib
import faulthandler
import gc
import itertools
import os
import queue
import tempfile
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from graphopt._torch import forget_shardings
from tests.support.captures import captured_once


class RankFailed(AssertionError):
    """A function raised on some rank, or did not come back in time."""


class Ranks:
    """`world` processes in one gloo group on this machine."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._stacks = [Path(self._folder.name) / f"stacks{rank}" for rank in range(world)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.preloaded"])
        self._tasks = [context.Queue() for _ in range(world)]
        self._results = context.Queue()
        store = str(Path(self._folder.name) / "store")
        self._processes = [
            context.Process(
                target=_serve,
                args=(rank, world, store, str(self._stacks[rank]), self._tasks[rank], self._results),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in self._processes:
            process.start()

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 240, lost: Collection[int] = ()
    ) -> list[Any]:
        """``function(rank, world, *args)`` on every rank; the results in rank order, without those that get lost in it.

        Raises RankFailed with the tracebacks of the ranks that raised, or with every rank's stack after `timeout`.
        """
        for tasks in self._tasks:
            tasks.put((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        try:
            while len(answers) < self.world - len(lost):
                rank, succeeded, value = self._results.get(timeout=timeout)
                answers[rank] = (succeeded, value)
        except queue.Empty:
            raise RankFailed(f"ranks {sorted(set(range(self.world)) - set(answers))} hang:\n{self._stop()}") from None
        failures = [f"rank {rank}:\n{value}" for rank, (succeeded, value) in sorted(answers.items()) if not succeeded]
        if failures:
            self._stop()
            raise RankFailed("\n".join(failures))
        return [answers[rank][1] for rank in sorted(answers)]

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def _stop(self) -> str:
        """End the processes; where each of them stood."""
        import signal

        for process in self._processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGUSR1)
        for process in self._processes:
            process.join(timeout=1)
            process.kill()
            process.join()
        return "\n".join(path.read_text() for path in self._stacks if path.exists())

    def close(self) -> None:
        for tasks in self._tasks:
            with contextlib.suppress(ValueError):
                tasks.put(None)
        for process in self._processes:
            process.join(timeout=10)
            process.kill()


def _serve(rank: int, world: int, store: str, stacks: str, tasks: Any, results: Any) -> None:
    import signal

    with open(stacks, "w", encoding="utf-8") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        torch.set_num_threads(1)
        with captured_once():
            for number in itertools.count():
                task = tasks.get()
                if task is None:
                    return
                function, args = task
                # Groups of gloo have threads that wake up many times a second: those of one task end with it.
                dist.init_process_group("gloo", init_method=f"file://{store}{number}", rank=rank, world_size=world)
                try:
                    torch.manual_seed(0)
                    results.put((rank, True, function(rank, world, *args)))
                except BaseException:
                    results.put((rank, False, traceback.format_exc()))
                forget_shardings()
                dist.destroy_process_group()
                gc.collect()
