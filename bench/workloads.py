"""What is measured: models and batches that all rivals share."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, SEQUENCE, BATCH = 4096, 128, 2


def llama(layers: int = 8, hidden: int = 384, vocabulary: int = VOCABULARY) -> nn.Module:
    """A Llama of 17.3 M parameters by default, the same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def tokens(step: int, rank: int) -> torch.Tensor:
    """int64 [BATCH, SEQUENCE], decided by step and rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
