"""Correct programs to break: what each plan makes of a model, with the program from which no value may differ."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.inspect.workload import Workload
from graphopt.ir import Program
from graphopt.ir.snapshot import copied
from graphopt.lowering import Compilation, lower
from graphopt.passes.pipeline import PassRecord
from graphopt.plan import Plan
from graphopt.verify.meaning import Meaning
from graphopt.verify.verifier import Verifier
from tests.support.zoo import ZOO, gpt2

WORLD = 2


class Dropouts(nn.Module):
    """Two dropouts of one shape, a constant of the model's own, a buffer, a tied weight and rows that need padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(15, 15), nn.Linear(15, 15)
        self.twin = nn.Linear(15, 15, bias=False)
        self.twin.weight = self.first.weight
        self.norm = nn.BatchNorm1d(15)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor([0.5] * 15)
        x = nn.functional.dropout(torch.tanh(self.first(x)) * scale, 0.25)
        x = nn.functional.dropout(self.norm(self.twin(x) - self.second(x)), 0.25)
        return torch.softmax(x @ x.T, 1).square().mean() + x.square().mean()


@dataclass
class Subject:
    """A compilation; its final program; what it meant when it became a step program; how to run it."""

    compilation: Compilation
    program: Program
    meaning: Meaning
    verifier: Verifier
    workload: Workload

    def check(self, program: Program) -> None:
        """Raises VerificationError if `program` is not as correct as the subject."""
        self.verifier.check_same(self.meaning, self.verifier.check(program), program)


def _models() -> dict[str, tuple[Any, Any, str]]:
    def rows() -> dict[str, torch.Tensor]:
        return {"x": torch.randn(6, 15)}

    return {
        "Llama, stage 3": (ZOO["llama"].build, ZOO["llama"].batch, "zero=3,zero.bucket_bytes=65536"),
        "Llama, stage 3, offload": (
            ZOO["llama"].build,
            ZOO["llama"].batch,
            "zero=3,offload=disk,offload.least_bytes=0,offload.state=true",
        ),
        "Llama, stage 2, bf16": (ZOO["llama"].build, ZOO["llama"].batch, "zero=2,precision=bf16,precision.reduce=bf16"),
        "tied GPT-2 with dropout, stage 3, bf16": (lambda: gpt2(0.1), ZOO["gpt2"].batch, "zero=3,precision=bf16"),
        "BERT, stage 1": (ZOO["bert"].build, ZOO["bert"].batch, "zero=1"),
        "T5, stage 3, prefetch 2": (ZOO["t5"].build, ZOO["t5"].batch, "zero=3,zero.prefetch=2"),
        "Mixtral, stage 3, head kept": (
            ZOO["mixtral"].build,
            ZOO["mixtral"].batch,
            "zero=3,zero.keep_gathered=[lm_head*]",
        ),
        "dropouts, stage 3": (Dropouts, rows, "zero=3"),
        "dropouts, stage 0, one batch norm": (Dropouts, rows, "zero=0,batch_norm=global"),
    }


NAMES = list(_models())


@functools.cache
def subject(name: str) -> Subject:
    """Compiled once; programs are copied before they are broken."""
    build, batch, text = _models()[name]
    torch.manual_seed(0)
    model = build().train()
    kwargs = batch()
    plan = Plan.parse(f"{text},zero.whole_below=0").resolve(WORLD)
    programs: list[tuple[str, Program]] = []

    def keep(record: PassRecord, program: Program) -> None:
        programs.append((record.name, copied(program)))

    compilation = lower(model, (), kwargs, plan, observer=keep)
    verifier = Verifier(compilation.captured.fake_mode, plan.mesh, compilation.layouts)
    before_zero = programs[[name for name, _ in programs].index("zero") - 1][1]
    workload = Workload.of(model, (), kwargs, plan, compilation)
    return Subject(compilation, programs[-1][1], verifier.check(before_zero), verifier, workload)
