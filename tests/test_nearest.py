"""What a message offers in place of what does not exist."""

from graphopt.nearest import nearest


def test_a_close_choice_is_offered_alone() -> None:
    assert nearest("bukket", ["zero", "bucket", "schedule"]) == "the nearest is 'bucket'"
    assert nearest("zer", ["zero"], prefix="--") == "the nearest is '--zero'"


def test_without_one_a_few_are_offered_and_the_rest_counted() -> None:
    assert nearest("qqq", ["zero", "bucket"]) == "choose from zero, bucket"
    offered = nearest("qqq", [f"node_{index}" for index in range(40_000)])
    assert offered.endswith("node_11 and 39988 more")
    assert nearest("qqq", []) == "there is none to choose"
