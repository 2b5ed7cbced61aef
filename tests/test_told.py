"""What a report on a state dict says of the whole: what nothing told, and what is no head."""

import pytest
import torch

from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from lightning_hsu.report import compare, report


def square(*shape):
    return torch.randn(*(shape or (8, 8)), generator=torch.Generator().manual_seed(0))


UNDECIDED = {
    "alone": {"a.c_proj.weight": square()},
    "with a bias of either length": {"a.weight": square(), "a.bias": torch.zeros(8)},
    "beside a vector": {"a.weight": square(), "norm.weight": torch.ones(8)},
    "beside one without a bias": {"q.weight": square(), "up.weight": square(16, 8)},
}
TOLD = {
    "by a bias": {"a.weight": square(), "up.weight": square(16, 8), "up.bias": torch.zeros(16)},
    "by a transposed neighbour": {
        "h.0.attn.c_proj.weight": square(),
        "h.0.attn.c_attn.weight": square(8, 24),
        "h.0.attn.c_attn.bias": torch.zeros(24),
    },
    "not square": {"a.weight": square(4, 8)},
    "an embedding": {"embed.weight": square()},
}


@pytest.mark.parametrize("state", UNDECIDED.values(), ids=UNDECIDED)
def test_a_line_says_how_square_matrices_are_read_of_which_nothing_tells(state):
    (note,) = neurons_of_state_dict(state).notes
    assert note.startswith("a square matrix read by rows")
    assert note in [text for name, text in report(state).notes if not name]


@pytest.mark.parametrize("state", TOLD.values(), ids=TOLD)
def test_no_line_where_something_tells(state):
    assert neurons_of_state_dict(state).notes == []


def test_no_line_where_the_user_tells():
    state = {"a.weight": square(), "b.weight": square()}
    assert "2 square matrices" in neurons_of_state_dict(state).notes[0]
    neurons = {"a": "columns", "b": "rows"}
    assert neurons_of_state_dict(state, neurons=neurons).notes == []


def test_the_dictionary_of_an_autoencoder_is_no_head():
    """SAELens has it by rows, dictionary_learning by columns: both are measured alike."""
    directions = square(64, 16)
    encoder = square(64, 16)
    by_columns = {
        "encoder.weight": encoder,
        "encoder.bias": torch.zeros(64),
        "decoder.weight": directions.T.contiguous(),
    }
    by_rows = {"W_enc": encoder.T.contiguous(), "W_dec": directions, "b_dec": torch.zeros(16)}
    found = report(by_columns)
    assert not any(layer.full_space for layer in found.layers)
    assert not any(name == "head" for name, _ in found.notes)
    ratios = {layer.name: layer.ratio for layer in found.layers}
    others = {layer.name: layer.ratio for layer in report(by_rows).layers}
    assert ratios["decoder"] == pytest.approx(others["W_dec"], rel=1e-5)
    assert ratios["encoder"] == pytest.approx(others["W_enc"], rel=1e-5)


def test_notes_on_two_matched_dictionaries_keep_their_numbers_apart():
    first = {"W_enc": square(16, 64), "W_dec": square(64, 16)}
    other = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    text = str(compare(first, {**first, "W_dec": other}))
    assert "note: W_enc: " in text
    assert "note: W_dec: " in text


def test_a_printed_report_has_the_merges_that_were_asked_for():
    weight = square(8, 4)
    weight[5] = 2 * weight[1]
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.copy_(weight)
        net[0].bias.zero_()
    found = report(net, merge=3)
    assert found.merges is not None
    assert str(found.merges) in str(found)


def test_a_file_of_one_set_of_weights_needs_no_key(tmp_path):
    torch.save({"fc.weight": square()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="it needs no key"):
        report(tmp_path / "a.pt", key="nope")
