"""Layers split over ranks: step times beside PyTorch's tensor parallelism, bytes of a layer, seconds of the choice."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from bench.rivals import Step, plain_step
from bench.statistics import spread
from bench.train import Contest, measure
from bench.workloads import llama
from graphopt.capture.arguments import flatten_call, tensor_names
from graphopt.capture.export import capture
from graphopt.cost.device import hardware_of
from graphopt.cost.splitting import best_choice
from graphopt.dimensions.space import space_of
from graphopt.lowering import lower
from graphopt.passes import REGISTRY
from graphopt.passes.base import PassContext
from graphopt.passes.pipeline import Pipeline
from graphopt.passes.split_rules import WeightRules
from graphopt.plan import Plan

VOCABULARY, SEQUENCE, BATCH, LAYERS, HIDDEN = 8192, 256, 4, 4, 512
TOKENS, WIDTH = 4096, 4096  # of one sequence, and of a token in Llama-3-8B
_AGREEMENT = 1e-2  # losses are about 9


def step_times(rivals: list[str], world: int, rounds: int, steps: int) -> dict[str, Any]:
    """Training steps of a Llama split over `world` ranks, rivals interleaved.

    Raises ValueError if the losses of two rivals are apart.
    """
    found = measure(Contest(_model, _make, _tokens), rivals, world, rounds, steps)
    apart = found["largest_loss_difference"]
    if max(apart.values()) > _AGREEMENT:
        raise ValueError(f"losses on {world} ranks differ by up to {apart} from {found['reference']}'s")
    return found


def _model() -> nn.Module:
    return llama(LAYERS, HIDDEN, VOCABULARY)


def _make(name: str, model: nn.Module) -> Step:
    return RIVALS[name](model)


def _tokens(step: int, rank: int) -> torch.Tensor:
    """int64 [BATCH, SEQUENCE], the same on all ranks."""
    return torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(step))


def _graphopt(model: nn.Module, transport: str = "auto") -> Step:
    ids = _tokens(0, 0)
    plan = graphopt.Plan(mesh={"tp": dist.get_world_size()}, transport=transport)
    return plain_step(graphopt.compile(model, plan, example_inputs={"input_ids": ids, "labels": ids}), foreach=False)


def _torch(model: Any) -> Step:
    """Split by hand as in PyTorch's tutorial of tensor parallelism: Megatron's columns and rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    layer = {**{name: ColwiseParallel() for name in columns}, **{name: RowwiseParallel() for name in rows}}
    for each in model.model.layers:
        parallelize_module(each, mesh, layer)  # type: ignore[arg-type]
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)  # type: ignore[arg-type]
    return plain_step(model, foreach=False)


RIVALS: dict[str, Callable[[nn.Module], Step]] = {
    "torch-tp": _torch,
    "graphopt-tp": _graphopt,
    "graphopt-tp-gloo": lambda model: _graphopt(model, "group"),
}


def llama_8b(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """So many layers of the shape of Llama-3-8B on the meta device, in float32, and a sequence of 4,096 tokens."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=WIDTH,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    with torch.device("meta"):
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        return LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}


def layer_bytes(ranks: int) -> dict[str, Any]:
    """Bytes that each of `ranks` ranks sends for one layer of Llama-3-8B and one sequence, forward and backward.

    megatron: what four all-reduces of an activation send, one behind each product that sums, and one in front of each
    pair of products in backward (Shoeybi et al. 2019).
    """
    found = {name: _of_a_layer(ranks, options) for name, options in (("", ""), ("sequence", ",sequence=true"))}
    return {
        "megatron": 4 * 2 * (ranks - 1) / ranks * TOKENS * WIDTH * torch.float32.itemsize,
        "weights": found[""],
        "sequence": found["sequence"],
    }


def _of_a_layer(ranks: int, options: str) -> dict[str, float]:
    """By kind of collective: what a step with three layers sends, less one with two."""
    two, three = (_sent(layers, ranks, options) for layers in (2, 3))
    return {kind: three[kind] - two.get(kind, 0.0) for kind in three}


def _sent(layers: int, ranks: int, options: str) -> Mapping[str, float]:
    model, batch = llama_8b(layers)
    plan = Plan(mesh={"tp": ranks}, passes=f"canonicalize,split{{axis=tp{options}}},differentiate").resolve(ranks)
    return {kind: sent for (kind, _), sent in lower(model, (), batch, plan).report.communication.bytes.items()}


def choosing(layers: int, splits: tuple[int, ...], rounds: int) -> dict[int, dict[str, Any]]:
    """Seconds from a captured Llama-3-8B of so many layers to the choice of its split over each number of ranks.

    classes: of dimensions. space: all strategies of each call. choice: the exact optimum among them.
    """
    model, batch = llama_8b(layers)
    tensors, spec = flatten_call((), batch)
    captured = capture(model, tensors, spec, tensor_names(model.forward, (), batch))
    hardware = hardware_of(torch.device("meta"))
    context = PassContext(captured.fake_mode, {"dp": 1}, {}, hardware=hardware)
    Pipeline.parse("canonicalize", REGISTRY).run(captured.program, context)
    taken: dict[int, dict[str, list[float]]] = {ranks: {} for ranks in splits}
    for _ in tqdm(range(rounds), desc="rounds"):
        for ranks in splits:
            marks = [time.perf_counter()]
            rules = WeightRules(captured.program, ranks, False)
            marks.append(time.perf_counter())
            space = space_of(captured.program, ranks, rules.may_cut, {})
            marks.append(time.perf_counter())
            best_choice(captured.program, space, hardware, "tp", rules.is_wanted)
            marks.append(time.perf_counter())
            for name, (start, end) in zip(("classes", "space", "choice"), itertools.pairwise(marks), strict=True):
                taken[ranks].setdefault(name, []).append(end - start)
            taken[ranks].setdefault("total", []).append(marks[-1] - marks[0])
    return {ranks: {name: asdict(spread(each)) for name, each in parts.items()} for ranks, parts in taken.items()}
