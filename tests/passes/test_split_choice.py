"""What is split is known to be best, and what a user names is kept to."""

import functools

import pytest
import torch
import transformers as hf

from graphopt.cost.communication import Communication, communication
from graphopt.errors import PassError
from tests.support.split import SplitProgram, split_program
from tests.support.split_models import MLPS, Blocks, tokens

RANKS, TOKENS, HIDDEN = 8, 4096, 4096
ACTIVATION = 4 * TOKENS * HIDDEN  # bytes


@functools.cache
def _llama(layers: int) -> SplitProgram:
    """Layers of Llama 3 8B."""
    config = hf.LlamaConfig(
        vocab_size=128256, hidden_size=HIDDEN, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = hf.LlamaForCausalLM(config).train(), torch.zeros(1, TOKENS, dtype=torch.long)
    return split_program(model, {"input_ids": ids, "labels": ids}, RANKS, "", "h100-sxm")


def _moved(split: SplitProgram) -> Communication:
    return communication(split.program, {"dp": 1, "tp": split.ranks})


def _dims(split: SplitProgram) -> dict[str, int | None]:
    """Along which dimension each parameter is split."""
    return {name: layout.splits[0].dim if layout.splits else None for name, layout in split.layouts.items()}


def test_weights_of_a_transformer_are_split_by_columns_then_rows() -> None:
    dims = _dims(_llama(2))
    for layer in ("model.layers.0", "model.layers.1"):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            assert dims[f"{layer}.{name}.weight"] == 0
        assert dims[f"{layer}.mlp.down_proj.weight"] == 1
        # As wide as what it is given: whether heads are gathered before it or summands scattered after is one.
        assert dims[f"{layer}.self_attn.o_proj.weight"] == dims["model.layers.0.self_attn.o_proj.weight"] is not None
    assert None not in (dims["model.embed_tokens.weight"], dims["lm_head.weight"])


def test_a_layer_moves_what_four_all_reduces_would() -> None:
    one, two = (_moved(_llama(layers)).bytes for layers in (1, 2))
    more = {kind: two[kind, "tp"] - one[kind, "tp"] for kind, _ in two}
    share = (RANKS - 1) / RANKS
    assert more["all-gather"] + more["reduce-scatter"] == 4 * 2 * share * ACTIVATION
    assert more["all-reduce"] == 2 * 2 * 2 * share * 4 * TOKENS  # of two norms one number a token, there and back


def test_the_loss_over_parts_of_the_vocabulary_moves_some_numbers_a_token() -> None:
    with torch.device("meta"):
        model = Blocks(vocabulary=128256, logits=False)
        batch = {"ids": torch.zeros(1, TOKENS, dtype=torch.long), "labels": torch.zeros(1, TOKENS, dtype=torch.long)}
    split = split_program(model, batch, RANKS, ",column=head,row=embedding", "h100-sxm")
    assert _dims(split) == {"embedding.weight": 0, "head.weight": 0, "head.bias": 0}
    assert _moved(split).total_bytes < TOKENS * 4 * 500, "of each token its hidden state and some numbers, no logits"


@pytest.mark.parametrize("options", ["", ",sequence=true"])
def test_named_modules_are_split_as_said(options: str) -> None:
    styles = ",column=layers.0.down|head,row=layers.0.gate,whole=layers.0.u*"
    dims = _dims(split_program(Blocks(MLPS["even"]()), tokens(), 2, styles + options))
    found = {name.removesuffix(".weight"): dims[name] for name in dims if "down" in name or "gate" in name}
    assert found == {
        "layers.0.gate": 1, "layers.0.gate.bias": None, "layers.0.down": 0, "layers.0.down.bias": 0,
    }  # fmt: skip
    assert dims["layers.0.up.weight"] is None
    assert dims["head.weight"] == 0


ERRORS = [
    (2, ",column=layers.0.gat", "no module with weights matches 'layers.0.gat'; .*layers.0.gate"),
    (2, ",column=head,row=hea*", "head matches 'head' column and 'hea\\*' row, which contradict each other; keep one"),
    (2, ",column=head,row=head", "'head' is to be column and row; say one"),
    (29, ",column=layers.0.gate", "layers.0.gate cannot be split by column over 29 ranks"),
    (41, "", "nothing can be split over the 41 ranks of tp: along weights, .*choose tp=1"),
    (41, ",along=sequence", "nothing can be split over the 41 ranks of tp: along sequence"),
    (2, ",along=sequences", "along=sequences is not one of weights, sequence, heads, experts; .*sequence"),
    (2, ",columns=head", "columns"),
]


@pytest.mark.parametrize(("ranks", "options", "said"), ERRORS)
def test_what_cannot_be_is_said(ranks: int, options: str, said: str) -> None:
    with pytest.raises(PassError, match=said):
        split_program(Blocks(MLPS["even"]()), tokens(), ranks, options)


def test_an_axis_that_the_mesh_has_not_is_said() -> None:
    with pytest.raises(PassError, match="the mesh has no axis 'tpp'"):
        split_program(Blocks(), tokens(), 2, axis="tpp")
