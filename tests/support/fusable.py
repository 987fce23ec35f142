"""Further architectures with patterns that kernels replace, and models in bf16, of one layer each."""

from collections.abc import Callable

import transformers as hf
from torch import nn

from tests.support.architectures import ARCHITECTURES
from tests.support.zoo import VOCABULARY, ZOO, Entry

_small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
_text = {"vocab_size": VOCABULARY, "use_cache": False}


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_text, **_small, num_key_value_heads=2, head_dim=16))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**_text, **_small, num_key_value_heads=2, sliding_window=8))


def gemma() -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**_text, **_small, num_key_value_heads=2, head_dim=16))


def gemma3() -> nn.Module:
    config = hf.Gemma3TextConfig(**_text, **_small, num_key_value_heads=2, head_dim=16, sliding_window=8)
    return hf.Gemma3ForCausalLM(config)


def gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_text, **_small, attention_dropout=0.0, hidden_dropout=0.0))


def gptj() -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
    return hf.GPTJForCausalLM(hf.GPTJConfig(**_text, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def gated_t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.0, use_cache=False, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def _in_bf16(entry: Entry) -> Entry:
    return Entry(lambda: entry.build().bfloat16(), entry.batch)


_BUILDERS: tuple[Callable[[], nn.Module], ...] = (
    qwen3, mistral, gemma, gemma3, gpt_neox, gptj, gated_t5,
)  # fmt: skip
_causal = ZOO["llama"].batch
FUSABLE: dict[str, Entry] = {build.__name__: Entry(build, _causal) for build in _BUILDERS}
IN_BF16: dict[str, Entry] = {
    f"{name} in bf16": _in_bf16((ZOO | ARCHITECTURES | FUSABLE)[name])
    for name in ("llama", "qwen3", "gemma2", "gpt2", "t5")
}
