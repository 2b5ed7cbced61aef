"""A file of a model of transformers and its config.json beside the model: the same neurons."""

import json
import re
import warnings

import pytest
import torch

from lightning_hsu._neurons.model_types import _TYPES
from lightning_hsu._neurons.select import select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from tests.real_models.libraries import missing
from tests.real_models.stored_types import CASES, NOT_STORED, RENAMED

pytestmark = pytest.mark.models

TOLERANCE = 1e-6  # the numbers are the same; float32 ones only change their order


def built(kind, settings, name):
    """A tiny model with no constant weights."""
    try:
        import transformers
    except ModuleNotFoundError:
        missing("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the library
        torch.manual_seed(0)
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.is_floating_point() and len(p.unique()) == 1:
                p.normal_(0, 0.02)
    return model


def stored(model, folder):
    """The tensors of a model's file by name, and its config."""
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def model_names(kind, file_name):
    """What a model calls a set of its file."""
    for pattern, name in RENAMED.get(kind, ()):
        file_name = re.sub(pattern, name, file_name)
    return file_name


def assert_the_same(expected, found):
    """The sets of a model and those that were read from its tensors, by name."""
    assert {name: one.shape for name, one in found.items()} == {
        name: one.shape for name, one in expected.items()
    }
    heads = {name for name, one in expected.items() if one.head}
    assert {name for name, one in found.items() if one.head} == heads
    for name, one in expected.items():
        assert found[name].kind == one.kind, name
        neurons = one.neurons().detach()
        torch.testing.assert_close(found[name].neurons(), neurons, atol=TOLERANCE, rtol=0, msg=name)


def case_name(case):
    return f"{case[0]}-{case[2]}"


@pytest.fixture(params=CASES, ids=case_name)
def case(request):
    return request.param


def test_a_file_is_read_as_its_model(case, tmp_path):
    kind, settings, name = case
    model = built(kind, settings, name)
    tensors, config = stored(model, tmp_path)
    expected = {one.name: one for one in select(model, everything=True)[0]}
    stand_ins = {name: x.to("meta") for name, x in tensors.items()}
    candidates = neurons_of_state_dict(stand_ins, load=tensors.__getitem__, config=config)
    found, _ = select(candidates, everything=True)
    reasons = {skip.name: skip.reason for skip in candidates.not_weights}
    for absent in NOT_STORED.get(kind, ()):
        del expected[absent]
        assert "not stored" in reasons[absent]
    assert not any("not known" in skip.reason for skip in candidates.not_weights if not skip.shape)
    assert_the_same(expected, {model_names(kind, one.name): one for one in found})


def test_a_state_dict_is_read_as_its_model(case):
    kind, settings, name = case
    model = built(kind, settings, name)
    config = json.loads(model.config.to_json_string()) | {"architectures": [name]}
    candidates = neurons_of_state_dict(model.state_dict(), config=config)
    found, _ = select(candidates, everything=True)
    expected = {one.name: one for one in select(model, everything=True)[0]}
    assert_the_same(expected, {one.name: one for one in found})


def test_every_type_of_the_table_is_compared():
    within_others = {"blip_text_model", "blip_vision_model", "siglip_text_model"}
    assert set(_TYPES) - within_others <= {kind for kind, _, _ in CASES}
