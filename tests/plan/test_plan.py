"""Plans: text, files, and one clear message for each that cannot be."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import Plan, PlanError, Tensor, Zero

_names = st.text("abcdefgh.*", min_size=1, max_size=8)
plans = st.builds(
    Plan,
    mesh=st.sampled_from([{}, {"dp": -1}, {"dp": 4}, {"dp": 2, "tp": 2}, {"ep": 2, "tp": -1}]),
    zero=st.builds(
        Zero,
        stage=st.integers(0, 3),
        bucket_bytes=st.none() | st.integers(1, 1 << 40),
        prefetch=st.integers(0, 9),
        whole_below=st.integers(0, 1 << 30),
        keep_gathered=st.booleans() | st.lists(_names, min_size=1, max_size=3).map(tuple),
    ),
    tensor=st.builds(
        Tensor,
        sequence=st.booleans(),
        patterns=st.dictionaries(_names, st.sampled_from(["column", "row", "whole"]), max_size=3),
        use_model_plan=st.booleans(),
    ),
    precision=st.sampled_from([None, "bf16", {"compute": "bf16", "reduce": "bf16"}]),
    dynamic=st.sampled_from([None, "batch", "sequence", "batch,sequence"]),
    passes=st.sampled_from([None, "canonicalize,differentiate,zero{stage=3}"]),
    kernels=st.sampled_from(["off", "auto"]),
    executor=st.sampled_from(["python", "inductor"]),
    batch_norm=st.sampled_from(["local", "global"]),
    verify=st.booleans(),
)


@given(plans)
def test_a_plan_prints_what_parses_to_it(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    assert hash(Plan.parse(str(plan))) == hash(plan)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".toml"])
@given(plan=plans)
def test_files_hold_plans(plan: Plan, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"plan{suffix}"
    plan.save(path)
    assert Plan.load(path) == plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zero=7", ["zero.stage=7", "nearest valid choice is 3"]),
        ("zro=3", ["zro", "'zero'"]),
        ("zero.buket_bytes=1", ["zero.buket_bytes", "'zero.bucket_bytes'"]),
        ("zero.prefetch=-2", ["zero.prefetch=-2", "nearest valid choice is 0"]),
        ("precision=fp16", ["fp16", "loss scaling", "bf16"]),
        ("precision=bf61", ["bf61", "'bf16'"]),
        ("dp=0", ["mesh.dp=0", "nearest valid choice is 1"]),
        ("executor=pyton", ["pyton", "'python'"]),
        ("dynamic=bacth", ["bacth", "'batch'"]),
        ("zero", ["'zero'", "name=value"]),
        ("zero=3,zero=1", ["zero twice"]),
        ("zero=3,zero.stage=1", ["zero.stage twice", "say zero once"]),
        ("dp=4,dp=2", ["dp twice", "say dp once"]),
        ("zero.bucket_bytes=8MB", ["'8MB'", "8MiB"]),
        ("tensor.patterns=[*.up:colum]", ["tensor.patterns[*.up]", "'colum'", "'column'"]),
        ("tensor.patterns=[*.up:row|*.up:column]", ["both row and column of '*.up'"]),
        ("tensor.patterns=up", ["tensor.patterns='up'", "pattern:kind"]),
        ("tensor.sequence=1", ["tensor.sequence=1", "true or false"]),
        ("tensor=true", ["tensor=True", "tensor.sequence="]),
        ("tensor.patern=[]", ["tensor.patern", "'tensor.patterns'"]),
        ("zero.bucket_bytes=0", ["zero.bucket_bytes=0", "nearest valid choice is 1"]),
    ],
)
def test_a_plan_that_cannot_be_says_what_could(text: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("size", [8 << 20, "8MiB", "8 MiB", "8192KiB", "8388608"])
def test_sizes_are_bytes_or_text_wherever_a_plan_is_written(size: int | str, tmp_path: Path) -> None:
    wanted = Plan(zero=Zero(3, bucket_bytes=8 << 20))
    (tmp_path / "plan.yaml").write_text(f"zero:\n  bucket_bytes: {size}\n")
    assert Plan.load(tmp_path / "plan.yaml") == wanted == Plan.parse(f"zero=3,zero.bucket_bytes={size}")
    assert Plan(zero={"bucket_bytes": size}) == wanted == Plan(zero=Zero(bucket_bytes=size))


def test_no_precision_and_a_reduction_in_another_dtype_can_be_written() -> None:
    assert Plan.parse("precision=none") == Plan()
    narrow = Plan(precision={"compute": "fp32", "reduce": "bf16"})
    assert Plan.parse(str(narrow)) == narrow


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(PlanError, match=r"unknown axis 'dq'.*dp"):
        Plan(mesh={"dq": 2})


@pytest.mark.parametrize(
    ("mesh", "world", "choice"),
    [
        ({"dp": 3}, 4, "dp=4"),
        ({"dp": 8}, 2, "larger than the world of 2.*dp=2"),
        ({"tp": 2}, 4, "mesh={'tp': 2} has 2 ranks and does not cover the world of 4.*dp=2"),
        ({"tp": 8}, 2, "tp=2"),
        ({"dp": 2, "tp": 2}, 3, "a world of 4"),
        ({"dp": -1, "tp": 2}, 3, "dp cannot be inferred"),
    ],
)
def test_a_mesh_that_does_not_fit_the_world(mesh: dict[str, int], world: int, choice: str) -> None:
    with pytest.raises(PlanError, match=choice):
        Plan(mesh=mesh).resolve(world)


def test_a_missing_size_comes_from_the_world() -> None:
    assert dict(Plan().resolve(6).mesh) == {"dp": 6} == dict(Plan(mesh={"dp": -1}).resolve(6).mesh)


def test_the_data_parallel_axis_is_there_and_the_others_split_the_model() -> None:
    plan = Plan.parse("ep=1,tp=2,dp=-1,cp=3").resolve(12)
    assert dict(plan.mesh) == {"ep": 1, "tp": 2, "dp": 2, "cp": 3} and plan.data_parallel_ranks == 2
    assert plan.model_axes == ("tp", "cp")
    alone = Plan(mesh={"tp": -1}).resolve(4)
    assert dict(alone.mesh) == {"dp": 1, "tp": 4} and alone.data_parallel_ranks == 1
    assert Plan().resolve(4).model_axes == ()


def test_how_layers_are_split_is_written_as_a_list_or_a_mapping() -> None:
    plan = Plan(mesh={"dp": 2, "tp": 2}, zero=3, tensor={"patterns": {"*.up": "column", "*.down": "row"}})
    assert str(plan) == "dp=2,tp=2,zero=3,tensor.patterns=[*.up:column|*.down:row]"
    assert plan.tensor == Tensor(patterns=["*.up:column", "*.down:row"])


def test_which_dimensions_stay_symbolic() -> None:
    assert Plan(dynamic="sequence").dynamic_dims_for("x", 1) == ()
    assert Plan(dynamic="batch,sequence").dynamic_dims_for("x", 3) == (0, 1)
    assert Plan(dynamic={"x": (2,)}).dynamic_dims_for("x", 3) == (2,)
    assert Plan(dynamic={"x": (2,)}).dynamic_dims_for("y", 3) == ()


def test_a_file_of_unknown_kind_or_without_sense(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no known kind"):
        Plan.load(tmp_path / "plan.ini")
    (tmp_path / "plan.yaml").write_text("[1, 2")
    with pytest.raises(PlanError, match="does not parse"):
        Plan.load(tmp_path / "plan.yaml")
