"""Signatures beside the operators themselves: on parts, joined, they give what they give on the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.dimensions.signature import operands_of
from tests.dimensions.calls import FAMILIES
from tests.support.parts import check_linear, check_parts, node_of


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_parts_joined_are_the_whole(family, data) -> None:
    torch.manual_seed(0)
    target, *arguments = family(data.draw)
    named = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    node = node_of(target, *arguments, **named)
    tensors = [operand.meta["val"] for operand in operands_of(node)]
    check_linear(node, tensors)
    for parts in (2, 3):
        check_parts(node, tensors, parts)
