"""The main job in small: deterministic text and tokens, and a loss that falls."""

from graphopt.examples.corpus import corpus
from graphopt.examples.tokens import Batches, train_tokenizer
from graphopt.examples.train_language_model import arguments, train
from tests.support.ranks import Ranks

SMALL = [
    "--steps",
    "24",
    "--batch",
    "4",
    "--sequence",
    "32",
    "--vocabulary",
    "512",
    "--hidden",
    "64",
    "--layers",
    "2",
    "--characters",
    "60000",
]


def test_text_and_tokens_are_the_same_at_every_start() -> None:
    text = corpus(50_000)
    assert text == corpus(50_000) and len(text) == 50_000
    first, second = (train_tokenizer(text, 400) for _ in range(2))
    ids = first.encode(text).ids
    assert ids == second.encode(text).ids and first.decode(ids) == text


def test_ranks_draw_different_batches() -> None:
    tokens = list(range(1000))
    first, again, other = (Batches(tokens, 2, 8, seed).next() for seed in (1, 1, 2))
    assert (first == again).all() and not (first == other).all() and first.shape == (2, 8)


def _train(rank: int, world: int) -> tuple[float, float]:
    return train(arguments(SMALL))


def test_training_lowers_the_held_out_loss(ranks) -> None:
    pool: Ranks = ranks(2)
    before, after = pool.run(_train)[0]
    assert after < before - 0.2
