"""A byte-level BPE trained on the spot, and batches of what it makes of a text."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """A byte-level byte-pair encoding of `vocabulary` tokens; the same text gives the same encoding on every rank."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


class Batches:
    """Random windows of a token sequence: reproducible, and different on every rank."""

    def __init__(self, tokens: list[int], batch: int, sequence: int, seed: int) -> None:
        self._tokens = torch.tensor(tokens)
        self._batch, self._sequence = batch, sequence
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> torch.Tensor:
        """int64 [batch, sequence]."""
        starts = torch.randint(len(self._tokens) - self._sequence, (self._batch,), generator=self._generator)
        return torch.stack([self._tokens[start : start + self._sequence] for start in starts])
