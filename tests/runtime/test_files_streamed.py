"""State that streams by is what it would be in memory, takes three chunks, and is read ahead and written behind."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import OffloadError
from graphopt.runtime.files import Part, StreamedState, TensorFiles, Transfer

GRAIN = 1024


@given(
    sizes=st.lists(st.one_of(st.integers(0, 10), st.integers(0, 5 * GRAIN)), max_size=12),
    later=st.lists(st.integers(0, 3 * GRAIN), max_size=3),
    rows=st.integers(1, 3),
    chunk=st.sampled_from([1, 3 * 4096, 40_000]),
    wanted=st.sets(st.integers(0, 14)),
)
def test_passes_see_each_element_once_and_keep_it(
    tmp_path_factory, sizes: list[int], later: list[int], rows: int, chunk: int, wanted: set[int]
) -> None:
    every = {f"p{i}": size for i, size in enumerate([*sizes, *later])}
    names = {name for i, name in enumerate(every) if i in wanted}
    memory = {name: torch.zeros(rows, size) for name, size in every.items()}
    stamps = {name: torch.arange(rows * size).view(rows, size) + 1.0 for name, size in every.items()}

    def change(parts: Sequence[Part]) -> None:
        for part in parts:
            assert part.start % GRAIN == 0 and part.rows.shape == (rows, part.stop - part.start)
            part.rows.mul_(2).add_(stamps[part.name][:, part.start : part.stop])

    with TensorFiles(tmp_path_factory.mktemp("files")) as files:
        state = StreamedState(files, "state", rows, chunk)
        state.add(dict(list(every.items())[: len(sizes)]))
        for step in range(3):
            if step == 1:
                state.add(dict(list(every.items())[len(sizes) :]))
            due = [name for name in (list(every)[: len(sizes)] if step == 0 else every) if step == 2 or name in names]
            state.update(change, due)
            for name in due:
                memory[name].mul_(2).add_(stamps[name])
        found = {name: torch.full((rows, size), -1.0) for name, size in every.items()}

        def look(parts: Sequence[Part]) -> None:
            for part in parts:
                found[part.name][:, part.start : part.stop] = part.rows
                part.rows.fill_(7)  # which is lost

        for _ in range(2):
            state.visit(look, every)
            assert all(torch.equal(found[name], memory[name]) for name in every)


class _Recorded(TensorFiles):
    """Writes down what is asked for, in order."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.events: list[str] = []
        self.addresses: set[int] = set()

    def write(self, name: str, tensor: torch.Tensor, context: str = "") -> Transfer:
        self.events.append(f"write {name}")
        self.addresses.add(tensor.data_ptr())
        return super().write(name, tensor, context)

    def read(self, name: str, out: torch.Tensor | None = None, context: str = "") -> Transfer:
        self.events.append(f"read {name}")
        return super().read(name, out, context)


def test_the_next_chunk_is_read_while_one_is_changed_and_the_last_is_written(tmp_path: Path) -> None:
    with _Recorded(tmp_path) as files:
        state = StreamedState(files, "s", 1, 4 * GRAIN)
        state.add({"a": 5 * GRAIN})
        state.update(lambda parts: None, ["a"])
        files.events.clear()
        state.update(lambda parts: files.events.append("change"), ["a"])
        begin = ["read s0", "read s1", "change", "write s0"]
        middle = [event for i in (1, 2, 3) for event in (f"read s{i + 1}", "change", f"write s{i}")]
        assert files.events == [*begin, *middle, "change", "write s4"]
        assert len(files.addresses) == 3


def test_what_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    with _Recorded(tmp_path) as files:
        state = StreamedState(files, "s", 1, 4 * GRAIN)
        state.add(dict.fromkeys("abc", GRAIN))
        state.update(lambda parts: None, "abc")
        files.events.clear()
        state.update(lambda parts: None, "b")
        assert files.events == ["read s1", "write s1"]


def test_errors_name_shard_and_moment_and_leave_nothing_under_way(tmp_path: Path) -> None:
    with TensorFiles(tmp_path) as files:
        state = StreamedState(files, "s", 2, 2 * 4 * GRAIN)
        state.add({"embedding": 3 * GRAIN, "bias": 7})
        state.update(lambda parts: None, ["embedding", "bias"])
        (tmp_path / "s2.tensor").unlink()
        seen: list[Part] = []
        wanted = (
            r"^step 4, state of 'embedding', elements 2048 to 3072: cannot read 's2' from .*s2\.tensor: No such file"
        )
        with pytest.raises(OffloadError, match=wanted):
            state.update(seen.extend, ["embedding", "bias"], "step 4")
        assert [part.start for part in seen] == [0, 1024]

        def fail(parts: Sequence[Part]) -> Any:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            state.update(fail, ["bias"])
        state.update(lambda parts: None, ["bias"])  # and goes on where nothing is missing


def test_transfers_overlap_with_the_change(tmp_path: Path) -> None:
    """The change of a chunk waits until the next one has been read: in a sequence of the two it never would be."""
    arrived = [threading.Event() for _ in range(4)]

    class Told(TensorFiles):
        def read(self, name: str, out: torch.Tensor | None = None, context: str = "") -> Transfer:
            transfer = super().read(name, out, context)

            def tell() -> None:
                transfer.settle()
                arrived[int(name[1:])].set()

            threading.Thread(target=tell).start()
            return transfer

    with Told(tmp_path) as files:
        state = StreamedState(files, "s", 1, 4 * GRAIN)
        state.add({"a": 4 * GRAIN})
        state.update(lambda parts: None, ["a"])

        def change(parts: Sequence[Part]) -> None:
            following = parts[0].stop // GRAIN
            assert following == 4 or arrived[following].wait(timeout=30)

        state.update(change, ["a"])
