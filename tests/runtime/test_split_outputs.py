"""Logits of which each rank has a part are never gathered, and can be when somebody wants them."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch.distributed.tensor import DTensor

import graphopt
from graphopt.errors import GraphoptError

_PARTS = "tp=2,tensor.gather_outputs=false,tensor.patterns=[lm_head:column]"
_BATCH, _LENGTH, _VOCABULARY = 2, 16, 8192


def _model() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=_VOCABULARY, use_cache=False, **sizes)).train()


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(_VOCABULARY, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def _call(rank: int, world: int) -> dict[str, Any]:
    model = graphopt.compile(_model(), _PARTS)
    found = model(**_batch())
    moved = graphopt.report(model).communication.total_bytes
    wanted = _model()(**_batch())
    assert isinstance(found.logits, DTensor)
    apart = float((found.logits.full_tensor() - wanted.logits).detach().abs().max())
    with pytest.raises(GraphoptError, match="gather_outputs=true"):
        found.logits.to_local().sum().backward()
    with torch.no_grad():
        evaluated = model(**_batch()).logits
    return {
        "apart": apart,
        "loss": abs(float((found.loss - wanted.loss).detach())),
        "part": tuple(found.logits.to_local().shape),
        "moved": moved,
        "evaluated": None
        if isinstance(evaluated, DTensor)
        else float((evaluated - wanted.logits).detach().abs().max()),
    }


def test_logits_stay_where_they_are_made(ranks) -> None:
    for found in ranks(2).run(_call):
        assert found["part"] == (_BATCH, _LENGTH, _VOCABULARY // 2)
        assert found["apart"] < 1e-6 and found["loss"] < 1e-6
        assert found["moved"] < 4 * _BATCH * _LENGTH * _VOCABULARY / 2 / 4  # a fourth of gathering them
        assert found["evaluated"] is not None and found["evaluated"] < 1e-6
