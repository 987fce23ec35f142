"""Small models of many architectures, with a batch that splits by rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

VOCABULARY = 199
ROWS = 8
_small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_text = {"vocab_size": VOCABULARY, "use_cache": False}

Batch = dict[str, Any]


def loss_of(output: Any) -> torch.Tensor:
    """The loss that a model returned, as an output of Transformers or by itself."""
    return output if isinstance(output, torch.Tensor) else output.loss


@dataclass(frozen=True)
class Entry:
    """build: a new model with random weights; batch: ROWS rows."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]

    def part(self, batch: Batch, rank: int, world: int) -> Batch:
        """The rows of one rank."""
        size = ROWS // world
        return {k: v[rank * size : (rank + 1) * size] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _tokens() -> Batch:
    ids = torch.randint(1, VOCABULARY, (ROWS, 16))
    return {"input_ids": ids, "labels": ids.clone()}


def _images() -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, 32, 32), "labels": torch.randint(0, 2, (ROWS,))}


def _speech() -> Batch:
    return {"input_features": torch.randn(ROWS, 16, 64), "labels": torch.randint(1, VOCABULARY, (ROWS, 8))}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_text, **_small, num_key_value_heads=2))


def gpt2(dropout: float = 0.0) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def bert(dropout: float = 0.0) -> nn.Module:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=VOCABULARY, **_small, **rates))


def t5(dropout: float = 0.0) -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        dropout_rate=dropout, use_cache=False,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**_small, image_size=32, patch_size=8))


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_text, **_small, num_key_value_heads=2, num_local_experts=4))


def deepseek() -> nn.Module:
    config = hf.DeepseekV3Config(
        **_text, **_small, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, experts_implementation="batched_mm",
    )  # fmt: skip
    return hf.DeepseekV3ForCausalLM(config)


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(**_text, hidden_size=64, num_hidden_layers=2, state_size=4))


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=32,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0, dropout=0.0, use_cache=False,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


class Clip(nn.Module):
    """CLIP with a loss that is a mean over rows; its own compares every row with every other of the same rank."""

    def __init__(self) -> None:
        super().__init__()
        text = {"vocab_size": VOCABULARY, **_small, "max_position_embeddings": 16, "eos_token_id": 1}
        config = hf.CLIPConfig(text_config=text, vision_config={**_small, "image_size": 32, "patch_size": 8})
        self.clip = hf.CLIPModel(config)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        found = self.clip(input_ids=input_ids, pixel_values=pixel_values)
        return F.mse_loss(found.text_embeds, found.image_embeds) * self.clip.logit_scale.exp()


def _pairs() -> Batch:
    return {"input_ids": torch.randint(2, VOCABULARY, (ROWS, 16)), "pixel_values": torch.randn(ROWS, 3, 32, 32)}


class ConvNet(nn.Module):
    """A small residual net with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv(x)))
        return F.mse_loss(self.head(x.mean((2, 3))), y)


class Odd(nn.Module):
    """Parameters of every awkward shape: scalars, fewer rows than ranks, none at all, frozen, unused, shared."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.one = nn.Parameter(torch.ones(1))
        self.row = nn.Parameter(torch.randn(1, 1, 7))
        self.empty = nn.Parameter(torch.zeros(0, 7))
        self.unused = nn.Parameter(torch.randn(9, 5))
        self.frozen = nn.Parameter(torch.randn(7, 7), requires_grad=False)
        self.first = nn.Linear(7, 5)
        self.shared = nn.Linear(5, 5)
        self.tied = nn.Linear(7, 5)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = (x + self.row[0]) @ self.frozen * self.scale + self.empty.sum()
        x = self.first(x) + self.tied(x) * self.one
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return F.mse_loss(self.last(x), y)


def _vectors(width: int, out: int) -> Callable[[], Batch]:
    return lambda: {"x": torch.randn(ROWS, width), "y": torch.randn(ROWS, out)}


class MixedDtypes(nn.Module):
    """Parameters of two dtypes in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(6, 10)
        self.wide = nn.Linear(10, 4).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.wide(torch.tanh(self.narrow(x)).double()).float(), y)


ZOO: dict[str, Entry] = {
    "llama": Entry(llama, _tokens),
    "gpt2": Entry(gpt2, _tokens),
    "bert": Entry(bert, _tokens),
    "t5": Entry(t5, _tokens),
    "vit": Entry(vit, _images),
    "mixtral": Entry(mixtral, _tokens),
    "deepseek": Entry(deepseek, _tokens),
    "mamba": Entry(mamba, _tokens),
    "whisper": Entry(whisper, _speech),
    "clip": Entry(Clip, _pairs),
    "odd": Entry(Odd, _vectors(7, 3)),
    "mixed": Entry(MixedDtypes, _vectors(6, 4)),
}
CONVNET = Entry(ConvNet, lambda: {"x": torch.randn(ROWS, 3, 8, 8), "y": torch.randn(ROWS, 5)})
WITH_DROPOUT: dict[str, Entry] = {
    "gpt2": Entry(lambda: gpt2(0.1), _tokens),
    "bert": Entry(lambda: bert(0.1), _tokens),
    "t5": Entry(lambda: t5(0.1), _tokens),
}
