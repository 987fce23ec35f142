"""Steps of a model that is cut into stages, beside those of one that is not, and what cannot be done with either."""

import os
import re
import signal
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import graphopt
from graphopt import GraphoptError, Plan
from graphopt.engines import PipelinedEngine, engine_of
from graphopt.runtime.collectives import Collectives
from graphopt.schedules import check, peak_live
from tests.support.pipelined import Case, by_steps
from tests.support.training import distance, same_bits, whole
from tests.support.zoo import ZOO


def _compiled(text: str, name: str = "llama") -> tuple[nn.Module, Case]:
    case = Case.of(name)
    return graphopt.compile(case.model, text, loss=case.loss), case


def _outputs(rank: int, world: int) -> list[Any]:
    found = []
    for text in ("pp=2,pipeline.microbatches=4", "pp=2,pipeline.microbatches=4,pipeline.outputs=last"):
        model, case = _compiled(text)
        model.train_step(case.batch)  # so the cut was decided for training
        output = model.eval_step(case.batch)
        found.append((type(output).__name__, output.loss, output.logits))
    return found


def test_evaluation_gives_what_the_model_returns(ranks) -> None:
    case = Case.of("llama")
    with torch.no_grad():
        wanted = case.model(**case.batch)
    for rank, (everywhere, at_the_last) in enumerate(ranks(2).run(_outputs)):
        for kind, loss, logits in [everywhere, *([at_the_last] if rank else [])]:
            assert kind == type(wanted).__name__
            torch.testing.assert_close(loss, wanted.loss)
            torch.testing.assert_close(logits, wanted.logits)
        if rank == 0:
            assert at_the_last[1:] == (None, None)


def _accumulated(rank: int, world: int) -> list[Any]:
    plans = ["dp=2,zero=3,zero.whole_below=64,pipeline.microbatches=2", "dp=2,zero=3,zero.whole_below=64"]
    return [by_steps("llama", plan, rank, world) for plan in plans]


def test_a_step_without_a_pipeline_adds_up_microbatches(ranks) -> None:
    for in_two, in_one in ranks(2).run(_accumulated):
        assert same_bits(in_two, in_one)
        assert distance(in_two, in_one) < 2e-6


def _in_bf16(rank: int, world: int) -> list[Any]:
    """The pipeline's own gradients, and those of the same model and microbatches in one process."""
    text = "precision=bf16,pipeline.microbatches=4"
    model, case = _compiled(f"pp=2,{text}")
    loss = model.train_step(case.batch)
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return [float(loss), names, gradients]


def test_gradients_in_bf16_are_those_without_a_pipeline(ranks) -> None:
    answers = ranks(2).run(_in_bf16)
    model, case = _compiled("precision=bf16,pipeline.microbatches=4")
    loss = float(model.train_step(case.batch))
    found = answers[0][2] | answers[1][2]
    assert answers[0][0] == answers[1][0] == loss
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(found[name], parameter.grad), name


def _gathered_once(rank: int, world: int) -> list[Any]:
    """By when parameters are gathered: gradients, what is left gathered behind the step, and gathers in it."""
    found = []
    for gather in ("microbatch", "step"):
        plan = f"pp=2,dp=2,zero=3,zero.whole_below=64,pipeline.microbatches=4,pipeline.gather={gather}"
        model, case = _compiled(plan)
        with mock.patch.object(Collectives, "all_gather", autospec=True, side_effect=Collectives.all_gather) as gathers:
            model.train_step(case.part(rank % 2, 2).batch)
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        found.append((gradients, gathers.call_count))
    return found


def test_parameters_may_be_gathered_once_a_step(ranks) -> None:
    for (each_time, often), (once, seldom) in ranks(4).run(_gathered_once):
        assert each_time.keys() == once.keys()
        assert all(torch.equal(gradient, once[name]) for name, gradient in each_time.items())
        assert seldom * 4 <= often


class Tied(nn.Module):
    """Both ends share a weight, of which the loss sees the second use alone if the first is detached."""

    def __init__(self, detached: bool, trained: bool) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.last.weight = self.first.weight
        self.first.weight.requires_grad_(trained)
        self.detached = detached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = self.middle(torch.tanh(y.detach() if self.detached else y))
        return self.last(torch.tanh(y)).square().mean()


TIED = [(False, True), (True, True), (False, False)]


def _tied(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for detached, trained in TIED:
        torch.manual_seed(0)
        model = graphopt.compile(Tied(detached, trained), "pp=2,pipeline.microbatches=2,pipeline.cuts=middle")
        model.train_step(torch.randn(4, 8))
        found.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    return found


def test_gradients_of_a_parameter_at_both_ends(ranks) -> None:
    """Their sum is on both ranks, also where one of them has none, and where the parameter is not trained."""
    answers = ranks(2).run(_tied)
    for index, (detached, trained) in enumerate(TIED):
        torch.manual_seed(0)
        model = Tied(detached, trained)
        x = torch.randn(4, 8)
        for part in x.chunk(2):
            (model(part) / 2).backward()
        for rank, answer in enumerate(answers):
            names = (["first.weight"] if trained else []) + (["middle.weight"] if rank == 1 else [])
            assert list(answer[index]) == names
            for name, gradient in answer[index].items():
                torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def _lengths(rank: int, world: int) -> list[float]:
    model, case = _compiled("pp=2,pipeline.microbatches=4")
    losses = []
    for length in (16, 9, 16):
        losses.append(float(model.train_step({name: value[:, :length] for name, value in case.batch.items()})))
        for parameter in model.parameters():
            parameter.grad = None
    return losses


def test_batches_of_other_lengths(ranks) -> None:
    for found in ranks(2).run(_lengths):
        for length, loss in zip((16, 9, 16), found, strict=True):
            case = Case.of("llama")
            rows = {name: value[:, :length] for name, value in case.batch.items()}
            parts = [{name: value[i : i + 2] for name, value in rows.items()} for i in range(0, 8, 2)]
            assert loss == pytest.approx(sum(float(case.model(**part).loss.detach()) for part in parts) / 4, rel=1e-6)


REFUSED = {
    "pp=2,pipeline.microbatches=9": "9 microbatches are more than the 8 rows of the batch; say pipeline.microbatches=8",
    "pp=2,pipeline=dualpipev,pipeline.microbatches=3": "takes at least as many microbatches as stages: 4, not 3",
    "pp=2,pipeline=1b1f": "no schedule is called '1b1f'; .*1f1b",
    "pp=2,pipeline=interleaved,pipeline.stages_per_rank=20": "40 stages are more than can be cut .* choose 21",
    "pp=2,pipeline.cuts=model.layer.1": "no module 'model.layer.1' runs",
    "pp=2,pipeline.memory=1KiB": "no cut into 2 stages leaves each at most 1KiB; the nearest takes",
    "pp=2,dynamic=batch": "dynamic=batch does not go with pp",
    "pp=2,passes=canonicalize\\,differentiate": "leaves each rank all layers; add cut",
}


def _refused(rank: int, world: int) -> list[str]:
    messages = []
    for text in REFUSED:
        values: dict[str, Any] = {"mesh": {"pp": 2}, "passes": "canonicalize,differentiate"}
        plan = Plan(**values) if "passes" in text else Plan.parse(text)
        try:
            case = Case.of("llama")
            graphopt.compile(case.model, plan).train_step(case.batch)
        except GraphoptError as error:
            messages.append(str(error))
        else:
            messages.append("nothing")
    return messages


def test_what_cannot_be_done_is_said_on_every_rank(ranks) -> None:
    for messages in ranks(2).run(_refused):
        for (text, wanted), message in zip(REFUSED.items(), messages, strict=True):
            assert re.search(wanted, message), f"{text}: {message}"


def _misused(rank: int, world: int) -> list[str]:
    model, case = _compiled("pp=2,pipeline.microbatches=4")
    without_loss = graphopt.compile(Case.of("unet").model, "pp=2,pipeline.microbatches=2")
    batch = Case.of("unet").batch
    calls = [
        lambda: model(**case.batch),
        lambda: model.train_step(case.batch, torch.zeros(8)),
        lambda: without_loss.train_step(batch),
        lambda: graphopt.no_sync(model),
    ]
    messages = []
    for call in calls:
        with pytest.raises(GraphoptError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_misuse_is_explained(ranks) -> None:
    for called, target, loss, no_sync in ranks(2).run(_misused):
        assert "is cut into 2 stages, so no rank can call all of it; say model.train_step(batch)" in called
        assert "there is a target, but no loss that takes it" in target
        assert "the model returns a tensor that is no scalar; return a scalar" in loss
        assert "reduces gradients once" in no_sync


def _dies(rank: int, world: int) -> str:
    model, case = _compiled("pp=2,pipeline.microbatches=4")
    model.train_step(case.batch)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        model.train_step(case.batch)
    except GraphoptError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_rank_that_dies_ends_the_step_of_the_others(ranks) -> None:
    answers = ranks(2).run(_dies, lost=[1])
    assert "RankLostError" in answers[0] and "rank 1" in answers[0]


def test_the_batch_may_be_a_tensor_a_tuple_or_a_mapping() -> None:
    case = Case.of("unet")
    x = case.batch["x"]
    losses = []
    batches: list[Any] = [x, (x,), {"x": x}, ((x,), {})]
    for batch in batches:
        torch.manual_seed(0)
        model = graphopt.compile(Case.of("unet").model, "pipeline.microbatches=2", loss=case.loss)
        losses.append(float(model.train_step(batch, case.target)))
    assert len(set(losses)) == 1
    with pytest.raises(GraphoptError, match="the arguments are a str"):
        model.train_step("x", case.target)


def test_a_model_of_one_process_has_steps_too() -> None:
    entry = ZOO["llama"]
    model, batch = graphopt.compile(entry.build()), entry.batch()
    loss = model.train_step(batch)
    assert float(loss) == float(model.eval_step(batch).loss)
    assert all(parameter.grad is not None for parameter in model.parameters())


def _searched(rank: int, world: int) -> str:
    model, case = _compiled("pp=2,pipeline=search,pipeline.live=3,pipeline.microbatches=4")
    engine = engine_of(model)
    assert isinstance(engine, PipelinedEngine)
    model.train_step(case.batch)
    check(engine.schedule)
    assert max(peak_live(engine.schedule)) <= 3
    return engine.schedule.to_text()


def test_all_ranks_find_the_same_schedule(ranks) -> None:
    assert len(set(ranks(2).run(_searched))) == 1
