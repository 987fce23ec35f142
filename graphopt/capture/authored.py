"""What a model's author says of how it may be split."""

from torch import nn

_STYLES = {
    "colwise": "column",
    "colwise_gather_output": "column",
    "colwise_rep": "column",
    "rowwise": "row",
    "rowwise_rep": "row",
    "embedding_rowwise": "row",
}


def authored_styles(model: nn.Module) -> dict[str, str]:
    """Patterns of modules -> ``column`` or ``row``, from the `tp_plan` that models of Transformers have.

    What it says of other kinds (packed columns, experts, norms) follows from the graph.
    """
    plan = getattr(model, "tp_plan", None)
    if not isinstance(plan, dict):
        return {}
    return {str(pattern): _STYLES[style] for pattern, style in plan.items() if style in _STYLES}
