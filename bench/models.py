"""Small models of seven architectures, each at three sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 199  # no multiple of a number of ranks, so that shards are padded


@dataclass(frozen=True)
class Dimensions:
    """rows and length: of the batch of one rank. Images have length / 2 pixels a side, at least 16."""

    layers: int
    hidden: int
    rows: int
    length: int


DIMENSIONS = {
    "small": Dimensions(layers=2, hidden=32, rows=2, length=32),
    "medium": Dimensions(layers=2, hidden=64, rows=3, length=64),
    "large": Dimensions(layers=3, hidden=128, rows=4, length=128),
}

Batch = dict[str, Any]
Build = Callable[[Dimensions], nn.Module]


@dataclass(frozen=True)
class Kind:
    """build: the model; batch: what it is called with."""

    build: Build
    batch: Callable[[Dimensions], Batch]


def _blocks(d: Dimensions) -> dict[str, int]:
    return {
        "hidden_size": d.hidden,
        "intermediate_size": 2 * d.hidden,
        "num_hidden_layers": d.layers,
        "num_attention_heads": 4,
    }


def _text(d: Dimensions) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "use_cache": False, **_blocks(d)}


def _llama(d: Dimensions) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_text(d), num_key_value_heads=2))


def _gpt2(d: Dimensions) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=d.hidden, n_layer=d.layers, n_head=4, n_positions=d.length, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def _bert(d: Dimensions) -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=VOCABULARY, **_blocks(d)))


def _t5(d: Dimensions) -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=d.hidden, d_kv=d.hidden // 4, d_ff=2 * d.hidden, num_layers=d.layers,
        num_heads=4, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def _side(d: Dimensions) -> int:
    return max(16, d.length // 2)


def _vit(d: Dimensions) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**_blocks(d), image_size=_side(d), patch_size=8))


def _mixtral(d: Dimensions) -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_text(d), num_key_value_heads=2, num_local_experts=4))


def _resnet(d: Dimensions) -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=d.hidden // 2, hidden_sizes=[d.hidden, 2 * d.hidden], depths=[d.layers, d.layers],
        layer_type="basic",
    )  # fmt: skip
    return hf.ResNetForImageClassification(config)


def _tokens(d: Dimensions) -> Batch:
    ids = torch.randint(1, VOCABULARY, (d.rows, d.length))
    return {"input_ids": ids, "labels": ids.clone()}


def _images(d: Dimensions) -> Batch:
    return {"pixel_values": torch.randn(d.rows, 3, _side(d), _side(d)), "labels": torch.randint(0, 2, (d.rows,))}


MODELS: Mapping[str, Kind] = {
    "llama": Kind(_llama, _tokens),
    "gpt2": Kind(_gpt2, _tokens),
    "bert": Kind(_bert, _tokens),
    "t5": Kind(_t5, _tokens),
    "vit": Kind(_vit, _images),
    "mixtral": Kind(_mixtral, _tokens),
    "resnet": Kind(_resnet, _images),
}
