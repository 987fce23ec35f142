"""synchronize_batch_norm: statistics that are stored more precisely than the model computes."""

import pytest
import torch
from torch import nn

from graphopt import Plan
from graphopt.errors import PassError
from graphopt.inspect.differential import check
from graphopt.ir import OutputKind
from graphopt.lowering.passes import planned_pipeline
from tests.support.programs import lowered


def _model(stored: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).to(stored)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["", ",precision=bf16"])
def test_statistics_keep_the_dtype_they_are_stored_in(stored: torch.dtype, precision: str) -> None:
    """Eager cannot compute a float64 norm of bf16; the sums over ranks can."""
    plan = f"zero=0,batch_norm=global{precision}"
    _, program = lowered(plan, 2, _model(stored), input=torch.randn(6, 3, 8, 8, dtype=stored))
    values = {role.name: node.meta["val"] for role, node in program.results_of(OutputKind.BUFFER) if node is not None}
    assert values["1.running_mean"].dtype == values["1.running_var"].dtype == stored


class _Copies(nn.Module):
    """A copy into a value, which autograd cannot go through before it is canonical."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(4)), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y.copy_(self.weight)
        return (self.norm(x) * y * x).square().mean()


def test_it_runs_on_canonical_programs_alone() -> None:
    batch = {"x": torch.randn(4, 4)}
    with pytest.raises(PassError, match="synchronize_batch_norm needs canonicalize before it"):
        planned_pipeline(Plan(mesh={"dp": 2}, passes="synchronize_batch_norm,canonicalize,differentiate,zero"))
    plan = Plan.parse("batch_norm=global").resolve(2)
    assert check(_Copies(), (), batch, plan).guilty is None
