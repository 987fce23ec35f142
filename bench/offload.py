"""Training whose state does not fit: on disk under a limit of memory, in memory without one, in memory under it."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from graphopt.sizes import readable_size

ROOT = Path(__file__).parents[1]
STATE = 16  # bytes of an element: parameter, gradient and two moments in float32
FIXED = 128 << 20  # bytes: the stacks and buffers of the threads that read and write


def beyond_memory(folder: Path, width: int, layers: int, steps: int, chunk_size: int) -> dict[str, Any]:
    """Runs of the same training in processes of their own, which may differ in nothing but seconds.

    The limit is half way between what parameters and gradients take with three chunks, and what they take with their
    state; with everything on disk, what parameters and gradients would take. It is one of live bytes as long as a layer
    takes more than 32 MiB: smaller ones malloc may keep when they are freed. Raises ValueError for a model that is too
    small for a difference, RuntimeError if a run that should end well does not.
    """
    elements = layers * width * width
    least = elements * STATE // 2 + 3 * chunk_size + FIXED
    limit = (least + elements * STATE) // 2
    if least > 0.8 * elements * STATE:
        raise ValueError(
            f"training {elements} elements takes {readable_size(elements * STATE)}, on disk as much: widen"
        )
    sizes = {"width": width, "layers": layers, "steps": steps, "chunk_size": chunk_size}
    in_memory = _run({**sizes, "folder": None, "limit": None})
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as inside:
        on_disk = _run({**sizes, "folder": inside, "limit": limit})
        everything = _run({**sizes, "folder": inside, "limit": elements * STATE // 2, "everything": True})
    too_large = _run({**sizes, "folder": None, "limit": limit})
    runs = {"its state in memory": in_memory, "its state on disk": on_disk, "everything on disk": everything}
    for name, run in runs.items():
        if "error" in run:
            raise RuntimeError(f"training with {name} failed: {run['error']}")
    return {
        "elements": elements,
        "state_bytes": elements * STATE,
        "limit_bytes": limit,
        "in_memory": in_memory,
        "on_disk": on_disk,
        "everything_on_disk": everything,
        "limit_with_everything_on_disk": elements * STATE // 2,
        "in_memory_under_the_limit": too_large,
        "is_bitwise_equal": all(
            in_memory[key] == run[key] for key in ("losses", "parameters") for run in (on_disk, everything)
        ),
        "step_ratio": statistics.median(on_disk["seconds"][1:]) / statistics.median(in_memory["seconds"][1:]),
    }


def _run(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the run printed, or the last line of how it failed."""
    command = [sys.executable, "-m", "bench.beyond_memory", json.dumps(arguments)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        return {"error": found.stderr.strip().splitlines()[-1]}
    return json.loads(found.stdout)  # type: ignore[no-any-return]
