"""A state dict of a real model is read as the model is, or a line says why not."""

import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from lightning_hsu._neurons.select import select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from tests.real_models.catalogue import entries
from tests.real_models.libraries import missing

pytestmark = pytest.mark.models

ALIKE = 58  # of 81 that are read alike without a word; measured: 61
RIGHT = 64  # that are read alike, some with a note on what shows it; measured: 66

TOLD_WHY = (
    "as its neighbours show",
    "as the shapes of its neighbours show",
    "as its neighbours show",
    "as GPT-OSS has them",
    "by columns; otherwise",
)
"""What a note contains that tells how a weight is read, where that is right."""


@pytest.fixture(scope="module", params=entries(), ids=lambda entry: entry.name)
def read(request):
    """The sets of a model and of its state dict, and the reasons of what is left out of that."""
    return both_readings(request.param)


GROUPED = ("pit_ti_224", "fastvit_t8", "edgenext_small_rw", "cpubone_b0_bfrobust", "repvgg_b1g4")
"""Of timm: several filters for each channel, and groups beside layers of a group's width."""


def both_readings(entry):
    for name in entry.imports:
        if find_spec(name) is None:
            missing(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries, as they build
        for name in entry.imports:
            import_module(name)
        torch.manual_seed(0)
        model = entry.build()
    return readings_of(model)


def readings_of(model, *, by_name=False):
    """The same of a model; of its state dict in the order of names, if so."""
    wanted, _ = select(model, everything=True)
    state = model.state_dict()
    if by_name:
        state = {name: state[name] for name in sorted(state)}
    candidates = neurons_of_state_dict(state)
    found, skips = select(candidates, everything=True)
    reasons = {skip.name: skip.reason for skip in [*skips, *candidates.not_weights]}
    wanted = {one.name: one for one in wanted}
    return wanted, {one.name: one for one in found}, reasons


def differences(read):
    """How a state dict is read unlike its model, by the name of the set."""
    wanted, found, reasons = read
    different = {}
    for name, one in wanted.items():
        if name not in found:
            different[name] = f"left out: {reasons.get(name, 'in another set')}"
        elif not is_same(one.neurons().detach(), found[name].neurons()):
            different[name] = f"{one.shape}, read as {found[name].shape}"
        elif one.head != found[name].head:
            different[name] = f"head: {one.head} ({one.head_reason}), read as {found[name].head}"
    for name in found.keys() - wanted.keys():
        different[name] = "in the state dict only"
    return different


def is_same(x, y):
    """Whether neurons are the same, up to the row of a padding: that of a model is left out.

    It is a row of zeros, which a report calls dead.
    """
    if y.shape[1] == x.shape[1] + 1:
        y = y[:, y[0].norm(dim=1) > 0]
    return x.shape == y.shape and torch.allclose(x.float(), y.float(), rtol=1e-6, atol=1e-6)


def notes_of(read):
    """The notes on a state dict by name, without those that the model has, too."""
    wanted, found, _ = read
    of_model = {one.note for one in wanted.values()}
    return {name: one.note for name, one in found.items() if one.note and one.note not in of_model}


def untold(read):
    """Differences on which nothing is said: no note, and no reason why a weight is left out."""
    _, _, reasons = read
    notes = notes_of(read)
    names = []
    for name in differences(read):
        about = [other for other in notes if is_around(name, other) or is_around(other, name)]
        if not about and name not in reasons:
            names.append(name)
    return names


def is_around(name, other):
    return name == other or other.startswith(f"{name}.") or is_sibling(name, other)


def is_sibling(name, other):
    """Whether both are parts of one weight."""
    above = name.rpartition(".")[0]
    return bool(above) and (other == above or other.startswith(f"{above}.base_layer"))


def test_every_difference_is_told(read):
    print(differences(read))
    assert untold(read) == []


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_read_or_told(name, by_name):
    if find_spec("timm") is None:
        missing("timm")
    build = import_module("timm").create_model
    read = readings_of(build(name), by_name=by_name)
    convolutions = {name for name, one in read[0].items() if one.kind == "convolution"}
    assert convolutions.isdisjoint(untold(read))


def test_no_note_without_a_difference(read):
    unexplained = {}
    for name, note in notes_of(read).items():
        if not any(text in note for text in TOLD_WHY):
            unexplained[name] = note
    assert not unexplained or differences(read)


def test_most_are_read_alike():
    alike = 0
    right = 0
    for entry in entries():
        one = both_readings(entry)
        if not differences(one):
            right += 1
            alike += not notes_of(one)
    print(
        f"{alike} alike, {right - alike} with a note, {len(entries()) - right} unlike, with a note"
    )
    assert alike >= ALIKE
    assert right >= RIGHT
