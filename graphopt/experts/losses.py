"""Losses that keep a router's choices even and its logits small."""

import torch


def loads_of(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """How often each of `experts` is chosen, float32 [experts]; numbers from `experts` on count for none.

    chosen: integers of any shape. A histogram, since its size depends on no value; torch's takes floating numbers on
    the CPU, and where it is to be deterministic integers on a GPU.
    """
    numbers = chosen.int() if chosen.is_cuda else chosen.float()
    return torch.histc(numbers, experts, 0, experts - 1).float()


def load_balancing_loss(probabilities: torch.Tensor, loads: torch.Tensor) -> torch.Tensor:
    """``experts * sum_i f_i P_i``, of no dimension: as large as tokens choose experts, where all are chosen alike.

    f_i: how often a token chooses expert i; P_i: its mean probability. Where a token chooses one expert, equations 4 to
    6 of Switch Transformers (Fedus et al. 2021, https://arxiv.org/abs/2101.03961) without their factor alpha; where it
    chooses several, all count (as for Mixtral, Jiang et al. 2024, https://arxiv.org/abs/2401.04088).

    probabilities: [tokens, experts], rows with sum one. loads: [experts], how often each was chosen; no gradient.
    """
    tokens, experts = probabilities.shape
    frequencies = loads.to(probabilities.dtype) / tokens
    return experts * (frequencies * probabilities.mean(0)).sum()


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """The mean of ``logsumexp(logits) ** 2`` over tokens, of no dimension.

    Equation 5 of ST-MoE (Zoph et al. 2022, https://arxiv.org/abs/2202.08906). logits: [tokens, experts].
    """
    return logits.logsumexp(-1).square().mean()
