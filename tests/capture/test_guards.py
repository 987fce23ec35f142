"""A program serves the calls it was made for; any other is compiled anew, and the log says why."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import CaptureError, Plan
from tests.support.zoo import VOCABULARY, ZOO


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = 2.0

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        y = self.linear(x) * self.scale
        return y + y if twice else y


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "graphopt"]


def test_another_shape_recompiles_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = graphopt.compile(_Scaled())
    with caplog.at_level(logging.WARNING, "graphopt"):
        for rows in (3, 5, 3, 5):
            x = torch.randn(rows, 4)
            assert torch.equal(model(x), model.linear(x) * 2)
    assert len(_messages(caplog)) == 1
    assert "x has shape (5, 4) where (3, 4) was captured" in _messages(caplog)[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_dynamic_sizes_run_as_they_are(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = ZOO[name].build().train()
    graphopt.compile(model, Plan(dynamic="batch,sequence", verify=True))
    twin = ZOO[name].build().train()
    twin.load_state_dict(model.state_dict())
    with caplog.at_level(logging.WARNING, "graphopt"):
        for rows, length in ((4, 16), (2, 8), (6, 23), (4, 16)):
            ids = torch.randint(1, VOCABULARY, (rows, length))
            for each in (model, twin):
                each.zero_grad()
                each(input_ids=ids, labels=ids).loss.backward()
            pairs = zip(model.parameters(), twin.parameters(), strict=True)
            apart = [float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs if b.grad is not None]
            assert max(apart) < 1e-4
    assert _messages(caplog) == []


def test_python_arguments_and_modes_are_part_of_the_key() -> None:
    model = graphopt.compile(_Scaled())
    x = torch.randn(3, 4)
    once = model(x)
    assert torch.equal(model(x, twice=True), once + once)
    with torch.no_grad():
        assert torch.equal(model(x), once) and not model(x).requires_grad


def test_a_changed_attribute_recompiles(caplog: pytest.LogCaptureFixture) -> None:
    model = graphopt.compile(_Scaled())
    x = torch.randn(3, 4)
    before = model(x)
    model.scale = 3.0
    with caplog.at_level(logging.WARNING, "graphopt"):
        assert torch.allclose(model(x), before * 1.5)
    assert "scale changed from 2.0 to 3.0" in _messages(caplog)[0]


def test_an_exchanged_forward_recompiles(caplog: pytest.LogCaptureFixture) -> None:
    model = graphopt.compile(_Scaled())
    x = torch.randn(3, 4)
    model(x)
    model.forward = lambda x: model.linear(x)  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "graphopt"):
        assert torch.equal(model(x), model.linear(x))
    assert "forward was exchanged" in _messages(caplog)[0]


def test_training_and_evaluation_are_programs_of_their_own() -> None:
    model = graphopt.compile(nn.Sequential(nn.Linear(4, 400), nn.Dropout(0.5)))
    x = torch.randn(3, 4)
    assert (model(x) == 0).any() and not (model.eval()(x) == 0).any() and (model.train()(x) == 0).any()


class _Decides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_control_flow_on_values_names_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = graphopt.compile(_Decides())
    with pytest.raises(CaptureError) as caught:
        model(torch.ones(3))
    text = str(caught.value)
    assert __file__ in text and "if x.sum() > 0" in text and "torch.where" in text
    assert "def forward" not in capsys.readouterr().err, "torch prints the graph that it had so far"


def test_a_cached_output_is_rebuilt() -> None:
    """Transformers return key/value caches that are no known container."""
    torch.manual_seed(0)
    model = ZOO["llama"].build().eval()
    model.config.use_cache = True
    ids = torch.randint(1, VOCABULARY, (2, 7))
    with torch.no_grad():
        wanted = model(input_ids=ids)
        found = graphopt.compile(model)(input_ids=ids)
    assert type(found.past_key_values) is type(wanted.past_key_values)
    assert found.past_key_values.get_seq_length() == 7
    assert torch.equal(found.logits, wanted.logits)


def test_an_argument_that_cannot_be_captured_is_named() -> None:
    model = graphopt.compile(_Scaled())

    class Strange:
        pass

    arguments: dict[str, Any] = {"x": torch.ones(1, 4), "twice": Strange()}
    with pytest.raises(CaptureError, match="Strange"):
        model(**arguments)
