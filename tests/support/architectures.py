"""Further architectures of Transformers than those of the zoo, of one layer each."""

import transformers as hf
from torch import nn

from tests.support.zoo import VOCABULARY, ZOO, Entry

_small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
_text = {"vocab_size": VOCABULARY, "use_cache": False}


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_text, **_small, num_key_value_heads=2))


def qwen3_moe() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_text, **_small, **experts, num_key_value_heads=2, head_dim=16))


def gemma2() -> nn.Module:
    config = hf.Gemma2Config(**_text, **_small, num_key_value_heads=2, head_dim=16, sliding_window=8)
    return hf.Gemma2ForCausalLM(config)


def phi() -> nn.Module:
    return hf.PhiForCausalLM(hf.PhiConfig(**_text, **_small))


def falcon() -> nn.Module:
    config = hf.FalconConfig(**_text, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    return hf.FalconForCausalLM(config)


def opt() -> nn.Module:
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return hf.OPTForCausalLM(hf.OPTConfig(**_text, **sizes, word_embed_proj_dim=64, dropout=0.0))


def deberta() -> nn.Module:
    config = hf.DebertaV2Config(
        vocab_size=VOCABULARY, **_small, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.DebertaV2ForMaskedLM(config)


def distilbert() -> nn.Module:
    sizes = {"dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4}
    config = hf.DistilBertConfig(vocab_size=VOCABULARY, **sizes, dropout=0.0, attention_dropout=0.0)
    return hf.DistilBertForMaskedLM(config)


def resnet() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    return hf.ResNetForImageClassification(config)


ARCHITECTURES: dict[str, Entry] = {
    **{build.__name__: Entry(build, ZOO["llama"].batch) for build in (qwen2, qwen3_moe, gemma2, phi, falcon, opt)},
    **{build.__name__: Entry(build, ZOO["llama"].batch) for build in (deberta, distilbert)},
    "resnet": Entry(resnet, ZOO["vit"].batch),
}
