"""Native code is built once, whoever asks; what is broken is built again; what cannot be built says why."""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.cuda_ext import adamw
from graphopt.cuda_ext.native import CPP, BuildError, Compiler, cache_directory, load

ANSWER = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAPHOPT_CACHE", str(folder))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(ANSWER)
    return path


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each time the compiler made something."""
    made, script = tmp_path / "compilations", tmp_path / "recording-g++"
    made.touch()
    script.write_text(f'#!/bin/sh\ncase "$*" in *-o*) echo made >> {made};; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return made


def _libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def _answers(source: Path, environment: dict[str, str], ready: Any, answers: Any) -> None:
    os.environ.update(environment)  # of now: the server that this was forked from may be older
    ready.wait()
    answers.put(load(source).answer())


def test_processes_that_start_together_build_once(cache: Path, source: Path, compilations: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ready, answers = context.Barrier(4), context.Queue()
    environment = {name: os.environ[name] for name in ("CXX", "GRAPHOPT_CACHE")}
    processes = [context.Process(target=_answers, args=(source, environment, ready, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=120) for _ in processes] == [42] * 4
    for process in processes:
        process.join()
    assert compilations.read_text() == "made\n" and len(_libraries(cache)) == 1


def test_what_is_in_the_cache_is_whole_readable_by_all_and_all_there_is(cache: Path, source: Path) -> None:
    before = os.umask(0o077)
    try:
        assert load(source).answer() == 42
    finally:
        os.umask(before)
    (library,) = _libraries(cache)
    assert library.stat().st_mode & 0o777 == 0o755
    assert set(cache.iterdir()) == {library, library.with_suffix(".lock")}


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_a_damaged_library_is_built_again(cache: Path, source: Path, compilations: Path, damage: str) -> None:
    load(source)
    (library,) = _libraries(cache)
    content = library.read_bytes()
    half = len(content) // 2
    damaged = {"empty": b"", "truncated": content[:half], "flipped": content[:half] + b"?" + content[half + 1 :]}
    library.unlink()  # what is mapped into this process stays as it is
    library.write_bytes(damaged[damage])
    assert load(source).answer() == 42
    assert library.read_bytes() == content and compilations.read_text() == "made\n" * 2


def test_libraries_are_named_by_all_they_are_made_from(cache: Path, source: Path, compilations: Path) -> None:
    load(source)
    load(source)
    assert compilations.read_text() == "made\n"
    load(source, Compiler(CPP.variable, CPP.command, (*CPP.flags, "-g")))
    source.write_text(ANSWER.replace("42", "43"))
    assert load(source).answer() == 43
    assert len(_libraries(cache)) == 3


def test_a_missing_compiler_is_named(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --flag")
    with pytest.raises(BuildError, match=r"there is no compiler 'no-such-compiler': .* \$CXX"):
        load(source)


def test_the_compiler_is_quoted_and_leaves_nothing(cache: Path, source: Path) -> None:
    source.write_text("int answer() { return fourtytwo; }")
    with pytest.raises(BuildError, match=r"(?s)g\+\+ failed on .*answer.cpp:\n.*fourtytwo"):
        load(source)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = tmp_path / "occupied"
    occupied.touch()
    monkeypatch.setenv("GRAPHOPT_CACHE", str(occupied))
    with pytest.raises(BuildError, match=r"occupied.*\$GRAPHOPT_CACHE names another folder"):
        load(source)


def test_a_library_that_lacks_another_is_named(cache: Path, source: Path) -> None:
    source.write_text('extern "C" int missing(); extern "C" int answer() { return missing(); }')
    with pytest.raises(BuildError, match=r"answer.cpp was built, but cannot be loaded: .*missing"):
        load(source, Compiler(CPP.variable, CPP.command, (*CPP.flags, "-Wl,-z,now")))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_directory() == Path("/a")
    monkeypatch.delenv("GRAPHOPT_CACHE")
    assert cache_directory() == Path("/b/graphopt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_directory() == Path("/c/.cache/graphopt")


@pytest.fixture
def without_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", "no-such-compiler")
    adamw._library.cache_clear()
    yield
    adamw._library.cache_clear()


def test_without_a_compiler_torch_computes_the_same_and_one_line_says_so(
    without_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    parameter, gradient = torch.randn(100), torch.randn(100)
    run = adamw.Run(parameter.clone(), gradient, torch.zeros(100), torch.zeros(100), torch.empty(100).bfloat16())
    theirs = torch.nn.Parameter(parameter.clone())
    theirs.grad = gradient.clone()
    optimizer = torch.optim.AdamW([theirs])
    with caplog.at_level(logging.WARNING, "graphopt"):
        for step in (1, 2, 3):
            adamw.update([run], adamw.Settings(step))
            optimizer.step()
    assert torch.equal(run.parameter, theirs) and run.copy is not None and torch.equal(run.copy, theirs.bfloat16())
    (message,) = caplog.messages
    assert "\n" not in message and "no compiler 'no-such-compiler'" in message
