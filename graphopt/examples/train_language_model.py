"""Train a small Llama on real text on every rank that was started: ``torchrun --nproc-per-node 2 -m …``."""

import argparse
import os
import time

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt import Plan
from graphopt.examples.corpus import corpus
from graphopt.examples.tokens import Batches, train_tokenizer


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="zero=3", help="how to run, as plan text")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--characters", type=int, default=3_000_000, help="of text to train on")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def mean_over_ranks(value: torch.Tensor) -> float:
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def evaluate(model: LlamaForCausalLM, tokens: list[int], options: argparse.Namespace) -> float:
    """Mean loss over four held-out batches, the same at every call."""
    batches = Batches(tokens, options.batch, options.sequence, seed=options.seed)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=(ids := batches.next()), labels=ids).loss for _ in range(4)]
    model.train()
    return mean_over_ranks(torch.stack(losses).mean())


def train(options: argparse.Namespace) -> tuple[float, float]:
    """Train, print progress and the report on the first rank; the held-out loss before and after."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    text = corpus(options.characters)
    tokens = train_tokenizer(text, options.vocabulary).encode(text).ids
    held_out, tokens = tokens[: len(tokens) // 20], tokens[len(tokens) // 20 :]

    model = graphopt.compile(build_model(options), Plan.parse(options.plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.1f} M parameters, {len(tokens) / 1e6:.1f} M tokens, {ranks} ranks, plan {options.plan}")

    before = evaluate(model, held_out, options)
    batches = Batches(tokens, options.batch, options.sequence, seed=options.seed + 1 + rank)
    progress = tqdm(range(options.steps), disable=rank != 0, unit="step", mininterval=1.0)
    for _ in progress:
        started = time.perf_counter()
        ids = batches.next()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        speed = ids.numel() * ranks / (time.perf_counter() - started)
        progress.set_postfix_str(f"loss {mean_over_ranks(loss):.3f}, {speed:.0f} tokens/s")
    report = graphopt.report(model)
    after = evaluate(model, held_out, options)
    if rank == 0:
        print(f"held-out loss {before:.3f} -> {after:.3f}")
        report.print()
    return before, after


def main() -> None:
    options = arguments()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    try:
        train(options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
