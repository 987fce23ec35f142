"""Which variant is chosen, why, and what is said where what is asked for cannot be had."""

import subprocess
import sys

import pytest
import torch

from graphopt.triton_kernels import choice
from graphopt.triton_kernels.choice import VARIABLE, Choice, Family, KernelError, asked, decided, mode_of_kernels
from graphopt.triton_kernels.norms.op import NORMS, RMS_NORM
from tests.support.kernels import in_interpreter, mode

FAMILY = Family("norms", widest=100)
WITH_NATIVE = Family("norms", widest=100, native=frozenset({torch.float32}))


class _OnGpu:
    """What a choice asks of a tensor, as one on a GPU answers."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda:0")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def dim(self) -> int:
        return len(self.shape)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a compute capability."""

    def of(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return of


@pytest.mark.parametrize("asked", ["reference", "off"])
def test_the_reference_is_had_by_asking(asked) -> None:
    with mode(asked):
        assert WITH_NATIVE.choose(torch.ones(2, 3)) == Choice("reference", f"kernels={asked}")


def test_what_models_call_themselves_is_computed_by_kernels_that_no_pass_put_in() -> None:
    called = Family("norms", widest=100, native=frozenset({torch.float32}), of_models=True)
    with mode("off"):
        assert called.choose(torch.ones(2, 3)).variant == "cuda"
    with mode("reference"):
        assert called.choose(torch.ones(2, 3)).variant == "reference"


def test_by_itself_the_cpu_has_native_code_or_the_reference() -> None:
    with mode("auto"):
        assert WITH_NATIVE.choose(torch.ones(2, 3)) == Choice("cuda", "torch.float32 on cpu, rows of 3")
        assert WITH_NATIVE.choose(torch.ones(2, 3).double()).variant == "reference"
        variant, why = FAMILY.choose(torch.ones(2, 3))
    assert variant == "reference" and why == "triton: on cpu; cuda: there is no native code"


def test_the_table_decides_on_a_gpu(gpu) -> None:
    gpu(9, 0)
    with mode("auto"):
        assert WITH_NATIVE.choose(_OnGpu((4, 100), torch.bfloat16)).variant == "triton"
        assert "rows of up to 100, not 101" in WITH_NATIVE.choose(_OnGpu((4, 101), torch.bfloat16)).why
        assert "Triton kernels take no torch.float64" in WITH_NATIVE.choose(_OnGpu((4, 4), torch.float64)).why
        gpu(7, 5)
        assert "(7, 5) is below (8, 0)" in FAMILY.choose(_OnGpu((4, 4), torch.float32)).why


def test_without_triton_the_reference_runs(gpu, monkeypatch) -> None:
    gpu(9, 0)
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    with mode("auto"):
        variant, why = FAMILY.choose(_OnGpu((4, 4), torch.float32))
    assert variant == "reference" and "triton is not installed" in why


def test_triton_on_the_cpu_needs_its_interpreter() -> None:
    with in_interpreter():
        assert FAMILY.choose(torch.ones(2, 3)) == Choice("triton", "kernels=triton")
    with mode("triton"), pytest.raises(KernelError, match=r"triton, but norms: on cpu, without .*; cuda takes it"):
        RMS_NORM(torch.ones(2, 3), None, 1e-6, 0.0, False)


def test_what_cannot_be_had_is_an_error() -> None:
    with mode("cuda"), pytest.raises(KernelError, match="cuda, but norms: there is no native code; reference takes it"):
        FAMILY.choose(torch.ones(2, 3))
    with mode("cuda"), pytest.raises(KernelError, match=r"native code takes no torch\.float64"):
        WITH_NATIVE.choose(torch.ones(2, 3).double())
    with mode("tritn"), pytest.raises(KernelError, match="GRAPHOPT_KERNELS is 'tritn': the nearest is 'triton'"):
        mode_of_kernels()


def test_on_a_gpu_the_choice_says_how_much_is_read_at_once(gpu) -> None:
    gpu(9, 0)
    with mode("auto"):
        wide, odd = (WITH_NATIVE.choose(_OnGpu((4, width), torch.bfloat16)).why for width in (64, 63))
    assert wide == "torch.bfloat16 on cuda:0, rows of 64, compute capability 9.0"
    assert odd.endswith("2 bytes at a time: rows are no multiples of 16")


def test_what_was_decided_for_a_program_holds_whatever_the_environment_says() -> None:
    with mode("triton"), decided("reference"):
        assert WITH_NATIVE.choose(torch.ones(2, 3)) == Choice("reference", "kernels=reference")
        with decided(None):
            assert mode_of_kernels() == "triton"
    with mode("triton"):
        assert mode_of_kernels() == "triton"


def test_the_environment_stands_in_the_place_of_what_is_planned(monkeypatch) -> None:
    with mode("reference"):
        assert asked("cuda") == "reference"
    monkeypatch.delenv(VARIABLE, raising=False)
    assert asked("cuda") == "cuda" and asked() == "auto"


def test_norms_are_computed_up_to_the_widest_row(gpu) -> None:
    gpu(9, 0)
    with mode("auto"):
        assert NORMS.choose(_OnGpu((1, 131072), torch.float32)).variant == "triton"


def test_operators_run_where_triton_is_not_installed() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from graphopt.triton_kernels.norms.op import RMS_NORM\n"
        "from graphopt.triton_kernels.activations.op import GATED\n"
        "from graphopt.triton_kernels.rotary.op import ROTARY\n"
        "from graphopt.triton_kernels.cross_entropy.linear import LINEAR_CROSS_ENTROPY\n"
        "assert RMS_NORM(torch.ones(2, 4), None, 0.0, 0.0, False)[0].tolist() == [[1.0] * 4] * 2\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
