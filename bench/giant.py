"""The shape of Llama-3.1-405B, without weights: a factory for ``graphopt-inspect``."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama_405b() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model in bf16 on the meta device, and a batch of one sequence of 8,192 tokens.

    Sizes from the table of architectures in "The Llama 3 Herd of Models" (2024).
    """
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        ids = torch.empty(1, 8192, dtype=torch.int64)
        return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}
