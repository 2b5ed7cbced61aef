"""Arguments in each other's places answer with the line that was meant, and that line runs."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from lightning_hsu import (
    CosineSchedule,
    HypersphericalUniformity,
    LinearSchedule,
    Schedule,
    Share,
    UniformityRegularizer,
)
from lightning_hsu.measures import KoLeo, RieszEnergy
from lightning_hsu.presets import PRESETS, recipes, sphere_uniformity
from lightning_hsu.projections import Projected

pytestmark = pytest.mark.usefixtures("shipped_defaults")  # which an answer leaves out

FROM_PRESETS = "from lightning_hsu.presets import sphere_uniformity"
FROM_MEASURES = "from lightning_hsu.measures import {}"
FROM_HERE = "from lightning_hsu import HypersphericalUniformity"


class Mine(HypersphericalUniformity):
    """A user's own callback."""


class MyEngine(UniformityRegularizer):
    """A user's own regularizer."""


@dataclass(frozen=True)
class MyMeasure(RieszEnergy):
    """A user's own measure."""


class Halving(Schedule):
    """A user's own schedule, which needs an argument."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value * 0.5**step


def rising(step):
    return min(1.0, step / 10)


SHARE = "Share(fraction=0.05, smoothing=0.9, maximum=10000.0)"
RIESZ = "RieszEnergy(s=2.0, half_space=False, distance='chordal', softening=0.01)"
PLACES = [  # the arguments; the call that is meant, of the class that was called; what to import
    ((0.1,), {}, "{}(coefficient=0.1)", ""),
    ((1,), {}, "{}(coefficient=1)", ""),
    ((0,), {}, "{}(coefficient=0)", ""),
    ((1e-5,), {}, "{}(coefficient=1e-05)", ""),
    ((np.float64(0.3),), {}, "{}(coefficient=0.3)", ""),
    ((np.float32(0.1),), {}, "{}(coefficient=0.1)", ""),
    ((np.int64(2),), {}, "{}(coefficient=2)", ""),
    (("0.1",), {}, "{}(coefficient=0.1)", ""),
    ((Share(0.05),), {}, "{}(coefficient=" + SHARE + ")", ""),
    ((Share,), {}, "{}(coefficient=Share())", ""),
    (
        (LinearSchedule(0.1),),
        {},
        "{}(coefficient=LinearSchedule(value=0.1, warmup=0, end=None, final=0.0))",
        "",
    ),
    ((CosineSchedule,), {}, "{}(coefficient=CosineSchedule(...))", ""),
    ((Halving,), {}, "{}(coefficient=Halving(...))", ""),
    ((rising,), {}, "{}(coefficient=rising)", ""),
    ((lambda step: 0.1,), {}, "{}(coefficient=lambda step: ...)", ""),
    (({"encoder.*": 0.3},), {}, "{}(coefficient={{'encoder.*': 0.3}})", ""),
    (("RieszEnergy",), {}, "{}(RieszEnergy())", FROM_MEASURES.format("RieszEnergy")),
    (("rieszenergy",), {}, "{}(RieszEnergy())", FROM_MEASURES.format("RieszEnergy")),
    (("RiezEnergy",), {}, "{}(RieszEnergy())", FROM_MEASURES.format("RieszEnergy")),
    (("lightning_hsu.measures.KoLeo",), {}, "{}(KoLeo())", FROM_MEASURES.format("KoLeo")),
    (("Projected",), {}, "{}(Projected())", "from lightning_hsu.projections import Projected"),
    ((RieszEnergy,), {}, "{}(RieszEnergy())", ""),
    ((Projected,), {}, "{}(Projected())", ""),
    ((MyMeasure,), {}, "{}(MyMeasure())", ""),
    ((), {"measure": 0.1}, "{}(coefficient=0.1)", ""),
    ((), {"coefficient": RieszEnergy()}, "{}(" + RIESZ + ")", ""),
    ((), {"coefficient": RieszEnergy}, "{}(RieszEnergy())", ""),
    ((), {"coefficient": "KoLeo"}, "{}(KoLeo())", FROM_MEASURES.format("KoLeo")),
    ((), {"coefficient": "0.3"}, "{}(coefficient=0.3)", ""),
    ((), {"coefficient": Share}, "{}(coefficient=Share())", ""),
    ((RieszEnergy, 0.1), {}, "{}(RieszEnergy(), coefficient=0.1)", ""),
    (
        ("KoLeo",),
        {"coefficient": 0.1},
        "{}(KoLeo(), coefficient=0.1)",
        FROM_MEASURES.format("KoLeo"),
    ),
    ((None, RieszEnergy()), {}, "{}(" + RIESZ + ")", ""),
    ((0.3, RieszEnergy()), {}, "{}(" + RIESZ + ", 0.3)", ""),
]
NAMES = [*((name, name) for name in PRESETS), ("half_mhe2", "half_mhe_2"), ("MHE", "mhe")]
NAMES += [("half-mhe-2", "half_mhe_2"), ("HalfMHE", "half_mhe"), ("comhe_adw", "comhe_adv")]
CALLED = [HypersphericalUniformity, UniformityRegularizer, Mine, MyEngine]


def answer(called, *arguments, error=TypeError, **settings):
    """The message of an error, which is one line."""
    with pytest.raises(error) as raised:
        called(*arguments, **settings)
    told = str(raised.value)
    assert "\n" not in told
    return told


def question(call, needed):
    """What such a message asks at its end."""
    return f"did you mean {call}? ({needed})" if needed else f"did you mean {call}?"


def run(call, needed):
    """What a line gives where its imports are done, with a user's names around it."""
    names = dict(globals())
    for name in re.findall(r"import (\w+)", needed):
        names.pop(name, None)
    exec(needed, names)
    return eval(call, names)


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize(
    ("arguments", "settings", "call", "needed"), PLACES, ids=[call for _, _, call, _ in PLACES]
)
def test_arguments_in_each_others_places(called, arguments, settings, call, needed):
    call = call.format(called.__name__)
    assert answer(called, *arguments, **settings).endswith(question(call, needed))
    if "..." not in call:
        assert isinstance(run(call, needed), called)


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("place", ["measure", "coefficient"])
@pytest.mark.parametrize(("name", "preset"), NAMES)
def test_names_of_presets(called, place, name, preset):
    call = f"sphere_uniformity({preset!r})"
    if issubclass(called, UniformityRegularizer):
        call += ".regularizer"
    told = answer(called, **{place: name})
    assert told.startswith(f"{place} must be ")
    assert told.endswith(question(call, FROM_PRESETS))
    made = run(call, FROM_PRESETS)
    engine = getattr(made, "regularizer", made)
    assert engine.measure == sphere_uniformity(preset).regularizer.measure


@pytest.mark.parametrize("called", CALLED)
def test_a_coefficient_beside_the_name_of_a_preset_is_told_to_be_lost(called):
    told = answer(called, "half_mhe_2", 0.1)
    assert "did you mean sphere_uniformity('half_mhe_2')" in told
    assert told.endswith("It has coefficients of its own, and no limit but share_limit=")


def test_a_presets_engine_trains_a_loop():
    """As the line for a regularizer says."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    engine = sphere_uniformity("half_mhe_2").regularizer.attach(net)
    net(torch.randn(4, 6)).square().mean().backward()
    before = net[0].weight.grad.clone()
    engine.add_gradients(optimizer)
    assert not torch.equal(net[0].weight.grad, before)


@pytest.mark.parametrize(
    ("name", "call", "needed"),
    [
        (0.1, "HypersphericalUniformity(coefficient=0.1)", FROM_HERE),
        (np.float32(0.1), "HypersphericalUniformity(coefficient=0.1)", FROM_HERE),
        (Share(0.05), f"HypersphericalUniformity(coefficient={SHARE})", FROM_HERE),
        ({"a": 0.1}, "HypersphericalUniformity(coefficient={'a': 0.1})", FROM_HERE),
        (RieszEnergy(), f"HypersphericalUniformity({RIESZ})", FROM_HERE),
        (RieszEnergy, "HypersphericalUniformity(RieszEnergy())", FROM_HERE),
    ],
    ids=str,
)
def test_what_is_no_name_of_a_preset(name, call, needed):
    told = answer(sphere_uniformity, name)
    assert told.startswith("name must be a preset's name such as 'half_mhe_2'; got ")
    assert told.endswith(question(call, needed))
    assert isinstance(run(call, needed), HypersphericalUniformity)


@pytest.mark.parametrize(
    ("name", "call", "needed"),
    [
        *((name, f"sphere_uniformity({preset!r})", FROM_PRESETS) for name, preset in NAMES[-5:]),
        ("0.1", "HypersphericalUniformity(coefficient=0.1)", FROM_HERE),
        (
            "KoLeo",
            "HypersphericalUniformity(KoLeo())",
            f"{FROM_MEASURES.format('KoLeo')}; {FROM_HERE}",
        ),
    ],
)
def test_names_that_no_preset_has(name, call, needed):
    told = answer(sphere_uniformity, name, error=ValueError)
    assert told.startswith(f"there is no preset {name!r}: {question(call, needed)}; the presets")
    assert isinstance(run(call, needed), HypersphericalUniformity)


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("wrong", [True, "strong", [], torch.tensor(0.1), object(), nn.ReLU()])
def test_where_nobody_knows_what_was_meant(called, wrong):
    assert answer(called, wrong).startswith("measure must be a measure such as RieszEnergy(s=2)")


@pytest.mark.parametrize("wrong", [None, 3.5j, ["mhe"]])
def test_a_preset_without_a_name(wrong):
    assert answer(sphere_uniformity, wrong).endswith(f"such as 'half_mhe_2'; got {wrong!r}")


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("strength", [RieszEnergy(), "half_mhe_2"])
def test_a_head_or_a_layer_has_no_measure_of_its_own(called, strength):
    """A measure can be called, as a schedule can, but not with a step."""
    told = answer(called, coefficient={"encoder.*": strength})
    assert told.startswith("coefficient['encoder.*'] must be a number")
    told = answer(called, head_coefficient=strength)
    assert told.startswith("head_coefficient must be a number")
    assert answer(called, KoLeo(), strength).startswith("coefficient must be a number")


def test_the_names_of_presets_are_those_of_their_recipes():
    assert set(recipes._RECIPES) == set(PRESETS)
