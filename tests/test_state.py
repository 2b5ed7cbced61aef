"""What a checkpoint holds is taken as far as it can be used, whatever it is; the rest begins anew, and one warning says so.

``python -m tests.test_state FILE`` writes a fixture such as those in tests/data: the states of three callbacks after some steps
of two optimizers, the weights, and those after one more step. ``state-unversioned.pt`` comes from before states had a version.
"""

import copy
import math
import sys
import warnings
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn

from lightning_hsu import LinearSchedule, Share, UniformityRegularizer
from lightning_hsu._engine.stored import VERSION
from lightning_hsu.measures import Covering, Measure, Polarization, RieszEnergy, Sampled
from lightning_hsu.presets import (
    OfficialAdversarialCoMHE,
    OfficialAngleCoMHE,
    OfficialMHC,
    OfficialMHP,
    OfficialRandomCoMHE,
)
from lightning_hsu.projections import AnglePreserving, Projected
from tests.models import Automatic, batches, loader, trainer, uniformity
from tests.test_memory import CARRYING

DATA = Path(__file__).parent / "data"
TAKES_WEIGHTS_ONLY = Version(pl.__version__) >= Version("2.6")
NAN, INF = math.nan, math.inf

# ---- fixtures

MEASURES = {
    "covering": {"measure": Covering(witnesses=3), "coefficient": LinearSchedule(0.1, 2)},
    "projected": {"measure": Projected(RieszEnergy(s=1), AnglePreserving(dim=3))},
    "sampled": {"measure": Sampled(RieszEnergy(s=1), block=4), "coefficient": 0.1},
}
MEASURES["projected"]["coefficient"] = Share(0.1)


class Two(pl.LightningModule):
    """Two optimizers, of which the second steps every other time; the layer that acts last is registered first."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.last = nn.Linear(24, 3)
        self.inner = nn.Linear(5, 24)
        self.x = torch.sin(torch.arange(20.0)).reshape(4, 5)
        self.done = 0

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.inner, self.last)]

    def loss(self):
        return self.last(self.inner(self.x).tanh()).square().mean()

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        self.zero_grad()
        self.manual_backward(self.loss())
        optimizers[0].step()
        if self.done % 2 == 0:
            optimizers[1].step()
        self.done += 1


def regularizers():
    return {name: UniformityRegularizer(**given) for name, given in MEASURES.items()}


def of_prefix(stored, name):
    """The state of one of the callbacks of a checkpoint."""
    return stored["callbacks"][f"HypersphericalUniformity{{'prefix': '{name}'}}"]


def stepped_from(stored):
    """Regularizers that have loaded the states of a fixture, and the weights after one more step of both optimizers."""
    module = Two()
    module.load_state_dict(stored["state_dict"])
    ours = regularizers()
    for name, regularizer in ours.items():
        regularizer.attach(module).load_state_dict(of_prefix(stored, name))
    module.loss().backward()
    for index, optimizer in enumerate(module.configure_optimizers()):
        for regularizer in ours.values():
            regularizer.add_gradients(optimizer, index=index)
        optimizer.step()
    return ours, module.state_dict()


def write(path):
    """Write a fixture."""
    torch.manual_seed(0)
    callbacks = [uniformity(prefix=name, **given) for name, given in MEASURES.items()]
    fit = trainer(*callbacks, max_epochs=1)
    fit.fit(Two(), loader(batches(count=4)))
    fit.save_checkpoint(path)
    whole = torch.load(path, weights_only=True)
    stored = {name: whole[name] for name in ("state_dict", "callbacks")}
    stored["after"] = stepped_from(stored)[1]
    torch.save(stored, path)


@pytest.mark.parametrize("name", ["state-v1.pt", "state-unversioned.pt"])
def test_states_written_before_are_read(name):
    stored = torch.load(DATA / name, weights_only=True)
    versions = {state.get("version") for state in stored["callbacks"].values()}
    assert versions == {1 if name == "state-v1.pt" else None}
    for prefix, regularizer in regularizers().items():
        before = of_prefix(stored, prefix)
        regularizer.load_state_dict(before)
        now = regularizer.state_dict()
        assert now["version"] == VERSION
        assert now["steps"] == [4, 2]
        assert now["heads"] == ["last"]
        for part in ("states", "shares"):
            torch.testing.assert_close(now.get(part), before.get(part), rtol=0, atol=0)
    ours, after = stepped_from(stored)
    torch.testing.assert_close(after, stored["after"], rtol=1e-4, atol=1e-5)
    counts = [regularizer.state_dict()["steps"] for regularizer in ours.values()]
    assert counts == [[5, 3]] * 3
    states = {name: one.state.measure_states.by_layer for name, one in ours.items()}
    assert int(states["covering"]["inner"]["step"]) == 4
    assert int(states["sampled"]["inner"]["draw"]) == 4
    projected = of_prefix(stored, "projected")["states"]["inner"]
    moved = states["projected"]["inner"]["matrix"] - projected["matrix"]
    assert float(moved.norm()) < 0.2  # one step of the projection; a fresh start takes 50
    factor = float(states["projected"]["inner"]["length"] / projected["length"])
    assert factor in (pytest.approx(0.5), pytest.approx(1.5))  # refused or taken
    assert set(ours["projected"].state.share_means.means) == {"inner", "last"}


# ---- what a measure is given


def torn(part):
    """Tensors that a file may hold in the place of a part of a state."""
    yield part.flatten()
    yield part[None]
    yield part[..., :0]
    yield part.reshape(-1)[0]
    yield part.repeat_interleave(2, 0)
    yield part.double() if part.dtype != torch.float64 else part.half()
    yield part.bool()
    yield part.to(torch.int32)
    yield torch.zeros_like(part)
    for number in (-1, 2**62, -(2**63), 1e38, NAN, INF):
        if part.is_floating_point() or (isinstance(number, int) and part.dtype == torch.int64):
            yield torch.full_like(part, number)


PUBLISHED = [
    OfficialRandomCoMHE(dim=4, count=2),
    OfficialAngleCoMHE(dim=4),
    OfficialAdversarialCoMHE(dim=4, inner_steps=2),
    OfficialMHP(),
    OfficialMHC(),
]


ANEW = {"exact", "multipliers", "shares"}  # parts that each step computes again


@pytest.mark.parametrize("measure", CARRYING, ids=repr)
def test_a_measure_goes_on_or_begins_afresh_whatever_a_state_holds(measure):
    x = torch.randn(2, 24, 5)
    state = measure.prepare(x)
    assert measure.goes_on(x, state)
    shapes = {key: one.shape for key, one in state.items()}
    for name, part in state.items():
        for other in torn(part):
            new = measure.prepare(x, state | {name: other})
            assert {key: one.shape for key, one in new.items()} == shapes
            assert measure.value_and_grad(x, new)[1].isfinite().all()
        without = {key: one for key, one in state.items() if key != name}
        assert measure.goes_on(x, without) == (name.split(".")[-1] in ANEW)
        assert measure.fits(x, measure.prepare(x, without))


def test_witnesses_that_are_not_on_the_sphere_are_no_start():
    x = torch.randn(24, 5)
    state = Covering().prepare(x)
    for factor in (0.9, 1e30, NAN):
        broken = state | {"points": factor * state["points"]}
        assert not Covering().goes_on(x, broken)
        assert int(Covering().prepare(x, broken)["step"]) == 0


def net():
    return nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 9))


def stepped(regularizer, model, steps=2):
    """The gradients' sum after some steps, which keep the weights finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().mean().backward()
        regularizer.add_gradients(optimizer)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def loaded(state, model, *, first=False, **given):
    """A regularizer with a stored state, the model attached before or after it, and what it warned of."""
    regularizer = UniformityRegularizer(head=None, **given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if first:
            regularizer.attach(model)
        regularizer.load_state_dict(state)
        told = [str(one.message) for one in caught]
        assert len(told) <= 1
        if not first:
            regularizer.attach(model)
    assert len(caught) - len(told) <= 1
    return regularizer, " ".join(str(one.message) for one in caught)


@pytest.mark.parametrize("measure", PUBLISHED, ids=repr)
def test_a_published_formula_trains_on_whatever_its_state_holds(measure):
    model = net()
    before = UniformityRegularizer(measure, head=None).attach(model)
    stepped(before, model)
    state = before.state_dict()
    assert loaded(state, model, measure=measure)[1] == ""
    for name, part in state["states"]["0"].items():
        for other in torn(part):
            broken = copy.deepcopy(state)
            broken["states"]["0"][name] = other
            twin = copy.deepcopy(model)
            stepped(loaded(broken, twin, measure=measure)[0], twin)


# ---- what a regularizer is given


def valid():
    """A state with every part, of a training of a few steps."""
    return copy.deepcopy(trained())


SEARCHES = {"measure": Covering(witnesses=2, steps=2), "coefficient": Share(0.1)}


@cache
def trained():
    torch.manual_seed(0)
    model = net()
    regularizer = UniformityRegularizer(head=None, **SEARCHES).attach(model)
    stepped(regularizer, model, 3)
    return regularizer.state_dict() | {"heads": ["2"]}


def changed(*path, to):
    """A valid state with something else in one place."""
    state = valid()
    part = state
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return state


CASES = {
    "no mapping": (["steps"], "state: it is a list, and not a mapping; schedules, shares"),
    "no steps": (
        {"version": 1},
        "steps: there are none; schedules and every_n_steps count from step 0",
    ),
    "newe ": (changed("version", to=7), "the state has version 7, and the newest known is 1"),
    "no version": (changed("version", to="one"), "version: 'one' is none"),
    "text": (changed("steps", to="ab"), "steps: 'ab' is no list of counts"),
    "negative": (changed("steps", to=[-5]), "steps: -5 of optimizer 0 is no count"),
    "float": (changed("steps", to=[2.0]), "2.0 of optimizer 0"),
    "bool": (changed("steps", to=[3, True]), "True of optimizer 1"),
    "NaN": (changed("steps", to=[NAN]), "nan of optimizer 0"),
    "huge": (changed("steps", to=[10**5000]), "a huge int of optimizer 0"),
    "long": (changed("steps", to=[0] * 10**6), "1000000 counts are more than there are optimizers"),
    "unknown": (changed("more", to=1), "unknown: 'more'; these parts are left out"),
    "no name": (changed(3, to=1), "unknown: 3;"),
    "no states": (changed("states", to=[1]), "states: a list is no mapping of layers"),
    "no state": (changed("states", "0", to=4), "states: layer '0' (4 is no mapping of tensors"),
    "no layer": (changed("states", None, to={}), "states: None is no name of a layer"),
    "no tenso ": (changed("states", "0", "points", to=[1.0]), "'points' is a list, and not a ten"),
    "sparse": (
        changed("states", "0", "points", to=torch.eye(2).to_sparse()),
        "'points' is sparse, nested, or without numbers",
    ),
    "meta": (changed("states", "0", "points", to=torch.empty(1, device="meta")), "without numbers"),
    "complex": (
        changed("states", "2", "points", to=torch.ones(1) * 1j),
        "'2' ('points' is of torch.complex64",
    ),
    "expanded": (
        changed("states", "0", "points", to=torch.zeros(1).expand(10**10)),
        "shape (10000000000,) is larger than what is stored",
    ),
    "broken": (changed("states", "0", "points", to=torch.tensor(NAN)), "holds NaN or infinite"),
    "misfit": (
        changed("states", "0", "points", to=torch.ones(1, 2, 4)),
        "layer '0' (1, 24, 5) (it is not one of Covering",
    ),
    "renamed": (
        {"steps": [3], "states": {"body.0": valid()["states"]["0"]}},
        "nothing for layer '0', '2', but something for 'body.0', which is not measured",
    ),
    "no shares": (changed("shares", to=None), "shares: None is no mapping of layers"),
    "NaN share": (
        changed("shares", "0", to=torch.tensor([NAN, 1])),
        "'0' (what is stored holds NaN",
    ),
    "wide share": (changed("shares", "0", to=torch.ones(3)), "shape (3,) is not two norms"),
    "negative share": (changed("shares", "2", to=-torch.ones(2)), "[-1.0, -1.0] are not norms"),
    "whole share": (changed("shares", "0", to=torch.ones(2).long()), "int64 and shape"),
    "head": (changed("heads", to=["2", 5]), "heads: 5 is no name of a layer; without them"),
    "no heads": (changed("heads", to={"2": 1}), "heads: a dict is no list of layers"),
}


@pytest.mark.parametrize("first", [True, False], ids=["attached", "not attached"])
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_is_left_out_and_named(case, first):
    state, words = CASES[case]
    model = net()
    regularizer, told = loaded(state, model, first=first, **SEARCHES)
    assert "the penalty's stored state is used only in part" in told
    assert words in told
    stepped(regularizer, model)


def tensors(state):
    """The tensors of a state by their place."""
    found = {("shares", name): part for name, part in state.get("shares", {}).items()}
    for name, parts in state.get("states", {}).items():
        found |= {("states", name, key): part for key, part in parts.items()}
    return found


def test_what_fits_is_loaded_beside_what_does_not():
    state = changed("states", "0", "points", to=torch.tensor(NAN))
    state["shares"]["2"] = "text"
    state["steps"] = [3, -1]
    now = loaded(state, net(), **SEARCHES)[0].state_dict()
    assert now["steps"] == [3, 0]
    assert now["heads"] == ["2"]
    assert set(now["states"]) == {"2"}
    assert set(now["shares"]) == {"0"}
    for place, part in tensors(now).items():
        assert torch.equal(part, tensors(valid())[place])


def test_a_state_that_fits_is_loaded_in_silence_and_copied():
    state = valid()
    for part in tensors(state).values():
        if part.is_floating_point():
            part.requires_grad_()
    regularizer, told = loaded(state, net(), **SEARCHES)
    assert told == ""
    state["steps"][0] = 100
    state["heads"].append("0")
    with torch.no_grad():
        for part in tensors(state).values():
            part.zero_()
    now = regularizer.state_dict()
    assert now["steps"] == [3]
    assert now["heads"] == ["2"]
    for place, part in tensors(now).items():
        assert torch.equal(part, tensors(valid())[place])
        assert not part.requires_grad


def test_states_that_a_measure_does_not_need_are_no_matter():
    for measure in (RieszEnergy(s=2), Sampled(RieszEnergy(s=1), block=512)):
        regularizer, told = loaded(valid(), net(), measure=measure)
        assert ("it is not one of" in told) == measure.has_state
        stepped(regularizer, net())


class Demanding(Measure):
    """A measure of one's own, whose ``prepare`` trusts its state."""

    def prepare(self, x, state=None):
        return {"shift": torch.zeros(len(x)) if state is None else state["shift"] * 1e30}

    def penalty(self, x, state=None):
        return x.square().sum((-2, -1)) + state["shift"][:, None].square().sum(-1) * x[:, 0, 0]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"other": torch.ones(1)}, "KeyError: 'shift'"),
        ({"shift": torch.ones(1)}, "a gradient that is not finite"),
    ],
)
def test_a_measure_of_ones_own_begins_afresh_where_it_fails(state, words):
    model = net()
    regularizer, told = loaded({"steps": [1], "states": {"0": state}}, model, measure=Demanding())
    assert words in told
    stepped(regularizer, model)


# ---- anything at all

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(2**70),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([1, (2,), (3,), (1, 2, 5), (1, 2, 24)]).map(torch.ones),
    st.sampled_from([(2,), (1,)]).map(lambda shape: torch.full(shape, NAN)),
)
KEYS = st.one_of(
    st.sampled_from(["0", "2", "points", "step", "steps", "shares", "states"]),
    st.integers(),
    st.none(),
)
JUNK = st.recursive(
    LEAVES,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(KEYS, one, max_size=3),
    max_leaves=8,
)
PARTS = st.sampled_from(["version", "steps", "states", "shares", "heads"])
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(st.one_of(JUNK, st.dictionaries(PARTS | KEYS, JUNK, max_size=5)), st.booleans())
def test_no_junk_stops_a_training(state, first):
    torch.manual_seed(0)
    model = net()
    stepped(loaded(state, model, first=first, **SEARCHES)[0], model)


def places(tree, path=()):
    """The paths of all parts of nested mappings and lists."""
    found = [path] if path else []
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            found += places(tree[key], (*path, key))
    return found


@QUICK
@given(st.data())
def test_one_changed_part_costs_its_layer_only(data):
    torch.manual_seed(0)
    path = data.draw(st.sampled_from(places(valid())))
    part = valid()
    for key in path:
        part = part[key]
    other = JUNK
    if isinstance(part, torch.Tensor):
        other = JUNK | st.sampled_from([*torn(part)])
    state = changed(*path, to=data.draw(other))
    model = net()
    regularizer, _ = loaded(state, model, **SEARCHES)
    now = tensors(regularizer.state_dict())
    for place, one in tensors(valid()).items():
        if place[: min(len(path), 2)] != path[:2]:
            assert torch.equal(now[place], one)
    if path[0] != "steps":
        assert regularizer.state_dict()["steps"] == valid()["steps"]
    stepped(regularizer, model)


# ---- in a Trainer

CARRIED = {"measure": Covering(witnesses=2, steps=2), "coefficient": Share(0.1)}
KEY = "HypersphericalUniformity{'prefix': 'hsu'}"


def fitted(callback, *others, epochs=1, **how):
    """A fit, and what was warned of in it besides what torch and Lightning say of themselves."""
    torch.manual_seed(0)
    module = Automatic()
    fit = trainer(callback, *others, max_epochs=epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        fit.fit(module, loader(batches(count=3)), **how)
    assert all(p.isfinite().all() for p in module.parameters())
    ours = ("stored state is used", "has no state under")
    told = [str(one.message) for one in caught]
    return fit, module, [text for text in told if any(one in text for one in ours)]


def resume(path, callback, checkpoint, *others):
    """Resume a tampered checkpoint; only plain types and tensors are read."""
    torch.save(checkpoint, path)
    assert torch.load(path, weights_only=True)
    how = {"weights_only": True} if TAKES_WEIGHTS_ONLY else {}
    return fitted(callback, *others, epochs=2, ckpt_path=path, **how)


@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
def test_a_tampered_checkpoint_is_resumed(apply, tmp_path):
    first, _, told = fitted(uniformity(apply=apply, **CARRIED))
    assert told == []
    first.save_checkpoint(tmp_path / "whole.ckpt")
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    _, untouched, told = resume(tmp_path / "0.ckpt", uniformity(apply=apply, **CARRIED), whole)
    assert told == []
    state = whole["callbacks"][KEY]
    state["shares"]["net.0"] = torch.tensor([NAN, 1.0])
    state["states"]["net.5"]["points"] = torch.ones(1, 1, 1)
    state["steps"] = ["three"]
    callback = uniformity(apply=apply, **CARRIED)
    _, module, told = resume(tmp_path / "1.ckpt", callback, whole)
    junk, misfit = told
    assert "steps: 'three' of optimizer 0 is no count; schedules" in junk
    assert "shares: layer 'net.0' (what is stored holds NaN or infinite numbers); the m" in junk
    assert "net.5" not in junk
    assert "states: layer 'net.5' (1, 12, 32) (it is not one of Covering" in misfit
    assert callback.state_dict()["steps"] == [3]
    assert int(callback.state_dict()["states"]["net.5"]["step"]) == 2
    assert int(callback.state_dict()["states"]["net.0"]["step"][0]) == 5
    weights = [torch.cat([p.flatten() for p in one.parameters()]) for one in (module, untouched)]
    assert not torch.equal(*weights)


def test_only_rank_zero_warns_of_a_state(monkeypatch):
    from lightning_utilities.core import rank_zero

    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", 1, raising=False)
    uniformity().load_state_dict({"steps": "none"})
    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", 0)
    with pytest.warns(UserWarning, match="steps: 'none' is no list of counts"):
        uniformity().load_state_dict({"steps": "none"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"coefficient": LinearSchedule(1.0, 2)},
            "the schedule of layer 'net.0', 'net.2', 'net.5'",
        ),
        (
            {"coefficient": {"net.5": Share(0.1)}},
            "the means of gradients for the Share of layer 'net.5'",
        ),
        ({"every_n_steps": 2}, "step 3: the count of every_n_steps=2. "),
        (
            {"measure": CARRYING[2]},
            "what the measure of layer 'net.0', 'net.2', 'net.5', 'net.7' s",
        ),
        ({"coefficient": 0.1}, None),
        ({"coefficient": 0, "measure": CARRYING[2], "every_n_steps": 2}, None),
    ],
    ids=["schedule", "share", "every_n_steps", "measure", "constant", "monitor"],
)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_a_resume_without_the_state_says_what_begins_anew(settings, words, tmp_path):
    with_other, _, _ = fitted(uniformity(prefix="other"))
    without, _, _ = fitted(pl.Callback())
    for name, fit in {"other": with_other, "without": without}.items():
        fit.save_checkpoint(tmp_path / name)
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        callback = uniformity(**settings)
        fit, _, told = resume(tmp_path / name, callback, checkpoint)
        assert callback.state_dict()["steps"] == ([] if settings.get("coefficient") == 0 else [3])
        assert len(told) == (words is not None)
        for text in told:
            assert f"no state under {KEY!r}" in text or f'no state under "{KEY}"' in text
            assert words in text
            assert ("'prefix': 'other'" in text) == (name == "other")
            assert ("added just now" in text) == (name == "without")


def test_a_second_fit_and_a_plain_start_need_no_state():
    callback = uniformity(coefficient=LinearSchedule(1.0, 2))
    fit, module, told = fitted(callback)
    assert told == []
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader(batches(count=3)))  # warnings are errors
    assert callback.state_dict()["steps"] == [6]


def test_the_same_callback_begins_anew_with_a_checkpoint_that_has_no_state(tmp_path):
    without, _, _ = fitted(pl.Callback())
    without.save_checkpoint(tmp_path / "without.ckpt")
    callback = uniformity(coefficient=LinearSchedule(1.0, 2))
    fit, module, _ = fitted(callback, epochs=2)
    with pytest.warns(UserWarning, match="begins anew at global step 3"):
        fit.fit(module, loader(batches(count=3)), ckpt_path=tmp_path / "without.ckpt")
    assert callback.state_dict()["steps"] == [3]


if __name__ == "__main__":
    write(sys.argv[1])


def test_the_state_of_another_measure_is_not_taken_over():
    """Both search for points, which have the same names and sizes."""
    model = net()
    first = UniformityRegularizer(Polarization(witnesses=2, steps=2), head=None).attach(model)
    stepped(first, model)
    assert first.state_dict()["states"]
    _, told = loaded(first.state_dict(), net(), measure=Covering(witnesses=2, steps=2))
    assert "it is of another measure, 'Polarization'" in told
