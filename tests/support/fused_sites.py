"""What a person would mark in models for kernels to replace, and what `fuse` finds.

``python -m tests.support.fused_sites`` writes the latter down anew.

Not marked: CLIP's activation, x * sigmoid(1.702 x); GELU behind a convolution or a product without bias. BLOOM is
missing: its activation is a torch.autograd.Function, which capture refuses.
"""

import json
from pathlib import Path

from graphopt.passes.base import PassContext
from graphopt.passes.fuse import Fuse
from tests.support.architectures import ARCHITECTURES
from tests.support.forward import forward_program
from tests.support.fusable import FUSABLE, IN_BF16
from tests.support.zoo import ZOO

ENTRIES = ZOO | ARCHITECTURES | FUSABLE | IN_BF16
FILE = Path(__file__).with_suffix(".json")
KINDS = ("norms", "gated", "bias_activation", "rotary", "cross_entropy")
# Of each kind, by reading the models' code.
EXPECTED: dict[str, tuple[int, int, int, int, int]] = {
    "llama": (5, 2, 0, 2, 1),  # before attention and before the feed-forward layer of two layers, and at the end
    "gpt2": (5, 0, 2, 0, 1),
    "bert": (6, 0, 3, 0, 1),  # one of the embeddings and one of the head
    "t5": (
        12,
        0,
        0,
        0,
        1,
    ),  # two a layer of the encoder, three of the decoder, and at the end of each; its activation is ReLU
    "vit": (5, 0, 2, 0, 1),
    "mixtral": (5, 2, 0, 2, 1),
    "deepseek": (9, 3, 0, 2, 1),  # two more a layer, of what queries and keys are made of; shared experts
    "mamba": (3, 2, 0, 0, 1),
    "whisper": (12, 0, 4, 0, 1),
    "clip": (11, 0, 0, 0, 0),
    "odd": (0, 0, 0, 0, 0),
    "mixed": (0, 0, 0, 0, 0),
    "qwen2": (3, 1, 0, 1, 1),
    "qwen3_moe": (5, 1, 0, 1, 1),  # also of queries and of keys
    "gemma2": (5, 1, 0, 1, 1),  # behind attention and feed-forward too
    "phi": (2, 0, 1, 1, 1),
    "falcon": (2, 0, 0, 1, 1),
    "opt": (3, 0, 0, 0, 1),
    "deberta": (4, 0, 2, 0, 1),
    "distilbert": (4, 0, 2, 0, 1),
    "resnet": (0, 0, 0, 0, 1),
    "qwen3": (5, 1, 0, 1, 1),
    "mistral": (3, 1, 0, 1, 1),
    "gemma": (3, 1, 0, 1, 1),
    "gemma3": (7, 1, 0, 1, 1),
    "gpt_neox": (3, 0, 1, 1, 1),
    "gptj": (2, 0, 1, 1, 1),
    "gated_t5": (7, 2, 0, 0, 1),
    "llama in bf16": (5, 2, 0, 2, 1),
    "qwen3 in bf16": (5, 1, 0, 1, 1),
    "gemma2 in bf16": (5, 1, 0, 1, 1),
    "gpt2 in bf16": (5, 0, 2, 0, 1),
    "t5 in bf16": (12, 0, 0, 0, 1),
}
# Of these kinds, in the models that have experts.
KINDS_OF_EXPERTS = ("route", "sort_by_expert", "permute_tokens", "unpermute_tokens", "grouped_mm")
EXPERTS: dict[str, tuple[int, int, int, int, int]] = {
    "mixtral": (2, 2, 2, 2, 4),
    "deepseek": (1, 0, 0, 0, 0),  # one of two layers has experts, and looks their matrices up token by token
    "qwen3_moe": (1, 1, 1, 1, 2),
}


def found_in(name: str) -> dict[str, int]:
    """How often each operator is put into a model's program."""
    program = forward_program(ENTRIES[name])
    context = PassContext(program.placeholders[0].meta["val"].fake_mode, {"dp": 1}, {})
    Fuse().run(program, context)
    return {operator: int(count) for operator, count in context.statistics.items()}


def by_kind(found: dict[str, int]) -> tuple[int, ...]:
    """The same, norms of all kinds together."""
    norms = sum(count for operator, count in found.items() if operator.endswith("_norm"))
    return (norms, *(found.get(kind, 0) for kind in KINDS[1:]))


def of_experts(found: dict[str, int]) -> tuple[int, ...]:
    """The same, of what models with experts have."""
    return tuple(found.get(kind, 0) for kind in KINDS_OF_EXPERTS)


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: found_in(name) for name in ENTRIES}, indent=1) + "\n")
