"""A model whose state exceeds the memory that its process may have trains with the state on disk."""

from pathlib import Path

import pytest

from bench.offload import beyond_memory


@pytest.mark.long
def test_training_beyond_memory_is_bitwise_training_in_memory(tmp_path: Path) -> None:
    found = beyond_memory(tmp_path, width=4096, layers=4, steps=3, chunk_size=16 << 20)
    assert found["is_bitwise_equal"]
    assert len(set(found["on_disk"]["losses"])) == 3
    assert (
        found["on_disk"]["data_bytes"]
        <= found["limit_bytes"]
        < found["state_bytes"]
        <= found["in_memory"]["data_bytes"]
    )
    half = found["state_bytes"] // 2
    assert found["everything_on_disk"]["data_bytes"] <= found["limit_with_everything_on_disk"] == half
    error = found["in_memory_under_the_limit"]["error"]
    assert "memory" in error.lower(), error
    assert not list(tmp_path.iterdir())
