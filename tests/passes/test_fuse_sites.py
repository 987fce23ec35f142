"""`fuse` finds what a person would mark in public models, and nothing else."""

import json

import pytest

from tests.support.fused_sites import ENTRIES, EXPECTED, EXPERTS, FILE, by_kind, found_in, of_experts

_FAST = ("llama", "gpt2", "qwen3 in bf16")


@pytest.mark.parametrize("name", [pytest.param(e, marks=[] if e in _FAST else pytest.mark.long) for e in ENTRIES])
def test_what_is_found_is_what_is_expected(name: str) -> None:
    found = found_in(name)
    assert by_kind(found) == EXPECTED[name]
    assert found == json.loads(FILE.read_text())[name]


def test_the_recorded_table_is_the_expected_one() -> None:
    recorded = json.loads(FILE.read_text())
    assert {name: by_kind(found) for name, found in recorded.items()} == EXPECTED
    assert {name: of_experts(found) for name, found in recorded.items() if any(of_experts(found))} == EXPERTS
