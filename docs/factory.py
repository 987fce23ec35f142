"""Models to inspect, on the meta device, which takes no memory."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama(layers: int = 32) -> tuple[nn.Module, dict[str, Any]]:
    """Llama-3-8B, and the keyword arguments of an example call."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    with torch.device("meta"):
        ids = torch.empty(1, 2048, dtype=torch.int64)
        return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def two_layers() -> tuple[nn.Module, dict[str, Any]]:
    """The same with two layers."""
    return llama(2)
