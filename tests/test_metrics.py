"""Metrics against measures and the callback; batches, ranks, samples, and torchmetrics' own machinery."""

import copy
import csv
import math
import pickle
import warnings
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import matplotlib
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_hsu import UniformityRegularizer
from lightning_hsu._core import smallest_angle
from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    GramDeterminant,
    KoLeo,
    Polarization,
    RieszEnergy,
    Sampled,
    Separation,
)
from lightning_hsu.metrics import FeatureUniformity, WeightUniformity, features
from lightning_hsu.metrics.hashing import hashed
from lightning_hsu.reference import uniformity_ratio, uniformity_score
from tests.models import Automatic, batches, loader, network, trainer, uniformity
from tests.plain import HALF_SPACE
from tests.processes import world

matplotlib.use("Agg")

MEASURES = [
    GaussianPotential(t=2),
    GaussianPotential(t=20),
    RieszEnergy(s=2, half_space=True),
    RieszEnergy(s=0),
    KoLeo(),
    Separation(),
    GramDeterminant(),
    Covering(),
    Polarization(),
]
QUANTITIES = ["ratio", "score", "energy", "min_angle", "penalty"]


def embeddings(n=60, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 0.3


def filled(metric, x, size=16):
    for batch in x.split(size):
        metric.update(batch)
    return metric


def value(metric, x, size=16):
    return float(filled(metric, x, size).compute())


# --- features: values ---


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_features_are_measured_as_the_measure_does(measure):
    x = embeddings(20, 5)
    expected = {
        "ratio": uniformity_ratio(measure, x),
        "score": uniformity_score(measure, x),
        "energy": measure(x),
        "min_angle": smallest_angle(x, half_space=measure.half_space).rad2deg(),
        "penalty": measure.penalty(x),
    }
    for quantity, known in expected.items():
        metric = FeatureUniformity(measure, quantity=quantity)
        found = filled(metric, x, 7).compute()
        assert found.shape == ()
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(known), rel=1e-5, abs=1e-6, nan_ok=True)
        better = (
            measure.higher_is_better if quantity == "energy" else quantity in ("score", "min_angle")
        )
        assert metric.higher_is_better is better
        assert metric.is_differentiable is False


def test_the_penalty_is_the_published_uniformity():
    x = embeddings()
    published = torch.pdist(nn.functional.normalize(x)).pow(2).mul(-2).exp().mean().log()
    assert value(FeatureUniformity(quantity="penalty"), x) == pytest.approx(
        float(published), rel=1e-6
    )


@pytest.mark.parametrize("capacity", [None, 64, 25])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_how_rows_are_batched_does_not_matter(capacity, quantity):
    x, make = embeddings(), lambda: FeatureUniformity(quantity=quantity, capacity=capacity)
    whole = value(make(), x, 60)
    for size in (1, 7, 59):
        assert value(make(), x, size) == pytest.approx(whole, rel=1e-5)
    metric = make()
    metric.update(x.reshape(3, 4, 5, 8))
    assert float(metric.compute()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("capacity", [None, 60])
def test_the_order_of_rows_does_not_matter_where_all_are_kept(capacity):
    x = embeddings()
    shuffled = x[torch.randperm(60)]
    known = float(uniformity_ratio(GaussianPotential(), x))
    for rows in (x, shuffled, x * torch.rand(60, 1).add(0.1) * 1e3):
        assert value(FeatureUniformity(capacity=capacity), rows) == pytest.approx(known, rel=1e-5)


def test_many_rows_are_sampled_as_the_callback_does(monkeypatch):
    x = embeddings(2101, 4)
    whole, sampled = float(GaussianPotential()(x)), float(Sampled(GaussianPotential())(x))
    assert whole != pytest.approx(sampled, rel=1e-4)
    assert value(FeatureUniformity(quantity="energy", capacity=None), x) == pytest.approx(
        whole, rel=1e-6
    )
    nearest = value(FeatureUniformity(quantity="min_angle", capacity=None), x)
    monkeypatch.setattr(features, "SAMPLE_ABOVE", 2100)
    assert value(FeatureUniformity(quantity="energy", capacity=None), x) == pytest.approx(
        sampled, rel=1e-6
    )
    assert (
        value(FeatureUniformity(quantity="min_angle", capacity=None), x) >= nearest
    )  # within blocks


# --- features: the sample ---


def kept(n, capacity, seed=0, size=50):
    """Which of n rows a sample holds: rows whose angle tells their number."""
    angle = torch.arange(n) * (math.pi / n)
    metric = filled(
        FeatureUniformity(capacity=capacity, seed=seed),
        torch.stack([angle.cos(), angle.sin()], 1),
        size,
    )
    rows, _ = metric._kept()
    return (torch.atan2(rows[:, 1], rows[:, 0]) * (n / math.pi)).round().long() % n


def test_the_sample_is_uniform_and_without_replacement():
    n, capacity, draws = 200, 50, 400
    counts = torch.zeros(n)
    for seed in range(draws):
        chosen = kept(n, capacity, seed)
        assert len(chosen.unique()) == capacity
        counts[chosen] += 1
    share = capacity / n
    deviation = (draws * share * (1 - share)) ** 0.5
    standard = (counts - draws * share) / deviation
    assert standard.abs().max() < 4.5  # of 200 standard normal numbers
    assert 0.8 < standard.std() < 1.2
    assert abs(counts[: n // 2].mean() - counts[n // 2 :].mean()) < 4 * 2 * deviation / n**0.5


def test_seeds_give_other_samples_and_the_same_seed_the_same():
    assert torch.equal(kept(500, 50), kept(500, 50, size=17))
    shared = len(set(kept(500, 50).tolist()) & set(kept(500, 50, seed=1).tolist()))
    assert shared < 15  # 5 by chance


def test_priorities_do_not_tie_and_every_bit_is_even():
    z = hashed(torch.arange(1 << 14), 3)
    assert len(z.unique()) == 1 << 14
    bits = (z[:, None] >> torch.arange(64)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 4.5 * 0.5 / 2**7


def test_memory_is_bounded():
    metric = FeatureUniformity(capacity=100)
    for _ in range(50):
        metric.update(torch.randn(64, 4))
        assert sum(map(len, metric.rows)) == sum(map(len, metric.priorities)) <= 200
    metric.update(torch.randn(5000, 4))
    assert sum(map(len, metric.rows)) <= 200
    assert int(metric.seen) == 8200


@pytest.mark.parametrize("capacity", [None, 40])
def test_ranks_that_take_turns_keep_what_one_process_keeps(capacity, monkeypatch):
    x = embeddings(121)
    one = filled(FeatureUniformity(capacity=capacity), x, 11)
    ranks = [FeatureUniformity(capacity=capacity) for _ in range(3)]
    for rank, metric in enumerate(ranks):
        monkeypatch.setattr(FeatureUniformity, "_rank", lambda self, rank=rank: (rank, 3))
        filled(metric, x[rank::3], 5 + rank)
    for metric in ranks[1:]:
        ranks[0].merge_state(metric)
    for mine, other in zip(one._kept(), ranks[0]._kept(), strict=True):
        torch.testing.assert_close(mine, other)
    assert float(one.compute()) == pytest.approx(float(ranks[0].compute()), rel=1e-5)


def test_samples_merge_by_seed_and_refuse_where_they_cannot():
    x, y = embeddings(90), embeddings(90, seed=1)
    metric = filled(FeatureUniformity(capacity=30), x)
    other = filled(FeatureUniformity(capacity=30, seed=1), y)
    metric.merge_state(other.metric_state)
    assert int(metric.seen) == 180
    assert len(metric._kept()[0]) == 30
    with pytest.raises(ValueError, match="its own seed"):
        filled(FeatureUniformity(capacity=30), x).merge_state(
            filled(FeatureUniformity(capacity=30), y)
        )
    with pytest.raises(ValueError, match="this one has 30, the other 40"):
        metric.merge_state(FeatureUniformity(capacity=40))


@pytest.mark.parametrize(
    ("capacity", "first", "second"), [(None, 90, 80), (200, 90, 80), (100, 90, 300), (100, 300, 90)]
)
def test_a_sample_that_is_whole_merges_as_rows(capacity, first, second):
    x, y = embeddings(first), embeddings(second, seed=1)
    metric = filled(FeatureUniformity(capacity=capacity), x)
    before = metric.compute()
    metric.merge_state(filled(FeatureUniformity(capacity=capacity), y))
    assert metric.compute() != before
    assert int(metric.seen) == first + second
    order = [x, y] if second < 100 else [y, x]  # the one that has dropped rows stays
    assert float(metric.compute()) == pytest.approx(
        value(FeatureUniformity(capacity=capacity), torch.cat(order)), rel=1e-6
    )


# --- features: what rows can be ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_measured_in_float32(dtype):
    x = embeddings().to(dtype)
    metric = FeatureUniformity().half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value(metric, x)
    assert found == pytest.approx(float(uniformity_ratio(GaussianPotential(), x.float())), rel=1e-5)
    assert metric.rows[0].dtype == torch.float32
    assert metric.set_dtype(torch.float16).priorities[0].dtype == torch.int64


def test_lengths_beyond_float32_are_no_matter():
    x = embeddings().double()
    scale = torch.logspace(-200, 200, 60, dtype=torch.float64)[:, None]
    assert value(FeatureUniformity(), x * scale) == pytest.approx(
        value(FeatureUniformity(), x), rel=1e-5
    )


def test_zero_and_nonfinite_rows_take_no_part():
    x = embeddings()
    spoiled = torch.cat(
        [
            x[:30],
            torch.zeros(3, 8),
            x[30:],
            torch.full((2, 8), torch.nan),
            torch.full((1, 8), torch.inf),
        ]
    )
    for quantity in QUANTITIES:
        known = value(FeatureUniformity(quantity=quantity), x)
        assert value(FeatureUniformity(quantity=quantity), spoiled) == pytest.approx(
            known, rel=1e-5
        )


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
@pytest.mark.parametrize(
    "x",
    [torch.ones(1, 4), torch.zeros(5, 4), torch.ones(0, 4), torch.eye(5, 4)[3:]],
    ids=["1", "0", "none", "dead"],
)
def test_fewer_than_two_rows(measure, x):
    for quantity in QUANTITIES:
        found = value(FeatureUniformity(measure, quantity=quantity), x)
        if quantity == "penalty":
            assert found == 0
        elif quantity == "energy":
            assert found == (1 if isinstance(measure, GaussianPotential) else 0)
        else:
            assert math.isnan(found)


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_duplicates_have_values(measure):
    x = embeddings(8, 4).repeat(2, 1)
    assert value(FeatureUniformity(measure, quantity="min_angle"), x) == 0
    for quantity in ("energy", "penalty", "ratio"):
        assert math.isfinite(value(FeatureUniformity(measure, quantity=quantity), x))
    assert value(FeatureUniformity(quantity="energy"), torch.ones(6, 3)) == pytest.approx(1)


def test_before_any_row():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert FeatureUniformity().compute().isnan()


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (
            torch.ones(3, 4, dtype=torch.int64),
            TypeError,
            r"int64 of shape \(3, 4\); cast with x.float",
        ),
        ([1.0, 2.0], TypeError, "got list"),
        (torch.tensor(1.0), ValueError, r"got shape \(\): a single embedding is x\[None\]"),
        (torch.ones(4), ValueError, r"got shape \(4,\): a single embedding is x\[None\]"),
        (torch.ones(4, 1), ValueError, r"d >= 2.*got shape \(4, 1\)"),
        (torch.ones(4, 0), ValueError, r"d >= 2.*got shape \(4, 0\)"),
        (torch.ones(4, 5), ValueError, r"d = 8; got shape \(4, 5\): reset\(\)"),
    ],
)
def test_wrong_rows_are_refused_in_words(x, error, words):
    metric = filled(FeatureUniformity(), embeddings())
    with pytest.raises(error, match=words):
        metric.update(x)
    assert int(metric.seen) == 60


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FeatureUniformity(capacity=1), ValueError, "capacity must be an int >= 2; got 1"),
        (lambda: FeatureUniformity(seed=-1), ValueError, "seed"),
        (lambda: FeatureUniformity(seed=2**63), ValueError, "seed"),
        (lambda: FeatureUniformity(quantity="size"), ValueError, "quantity must be 'ratio'"),
        (lambda: FeatureUniformity(GaussianPotential), TypeError, "must be an instance"),
        (lambda: WeightUniformity("mhe"), TypeError, "measure must be"),
        (
            lambda: WeightUniformity(reduction="sum"),
            ValueError,
            "reduction must be 'mean', 'max' or 'none'",
        ),
        (lambda: WeightUniformity(color=1), ValueError, "color"),
        (
            lambda: WeightUniformity().update(torch.ones(3, 3)),
            TypeError,
            "a model or its state dict; got Tensor",
        ),
        (lambda: WeightUniformity(include="x*").update(network()), ValueError, "matches"),
        (lambda: WeightUniformity(neurons={"0": "diagonal"}), ValueError, "must be 'rows'"),
        (lambda: WeightUniformity(neurons=["0"]), TypeError, "neurons maps patterns"),
    ],
)
def test_wrong_settings_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


# --- weights ---


@pytest.mark.parametrize(
    "net",
    [network, lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 3))],
)
def test_weights_are_measured_as_the_callback_does(net, tmp_path):
    module, logger = Automatic(net=net()), CSVLogger(tmp_path)
    callback = uniformity(coefficient=0.3)
    trainer(callback, logger=logger, log_every_n_steps=7, max_epochs=1).fit(
        module, loader(batches())
    )
    logged = read(logger)
    for name, settings in {"ratio_mean": {}, "ratio_max": {"reduction": "max"}}.items():
        metric = WeightUniformity(**settings)
        metric.update(module)
        assert float(metric.compute()) == pytest.approx(logged[name], rel=1e-6)
    for quantity in ("ratio", "energy", "min_angle"):
        found = WeightUniformity(quantity=quantity, reduction="none")(module)
        assert len(found) == sum(1 for layer in module.net if hasattr(layer, "weight"))
        for layer, x in found.items():
            assert x.shape == ()
            assert float(x) == pytest.approx(logged[f"{quantity}/{layer}"], rel=1e-6)


def read(logger):
    """What the log ends with."""
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return {
            k.removeprefix("hsu/"): float(v)
            for row in csv.DictReader(file)
            for k, v in row.items()
            if v
        }


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("measure", [None, Separation(), Covering()], ids=repr)
def test_a_state_dict_is_measured_as_its_model(measure, quantity):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 8, 3),
        nn.Flatten(),
        nn.Linear(72, 12),
        nn.Tanh(),
        nn.Linear(12, 4),
    )
    found = [
        WeightUniformity(measure, quantity=quantity, reduction="none")(source)
        for source in (net, net.state_dict())
    ]
    assert list(found[0]) == list(found[1]) == ["0", "1", "3", "5"]
    for name, x in found[0].items():
        assert float(x) == pytest.approx(float(found[1][name]), rel=1e-6, nan_ok=True)


def test_layers_are_chosen_by_pattern():
    net = network()
    assert list(WeightUniformity(reduction="none", include=["0", "5"])(net)) == ["0", "5"]
    assert list(WeightUniformity(reduction="none", exclude="0", head=None)(net)) == ["2", "5", "7"]
    assert list(WeightUniformity(reduction="none", include="5")(net.state_dict())) == ["5"]
    hidden = WeightUniformity(HALF_SPACE, include="7", head=None)
    assert hidden(net) != WeightUniformity(HALF_SPACE, include="7", head="7")(net)


def bare():
    """An embedding, a Linear, a dictionary whose atoms are columns, and a head."""
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "first": nn.Linear(6, 8)})
    net["dictionary"] = nn.ParameterDict({"W": nn.Parameter(torch.randn(4, 12))})
    net["head"] = nn.Linear(8, 5)
    return net


def first_half(weight):
    return weight.chunk(2)[0]


@pytest.mark.parametrize("of", [lambda net: net, nn.Module.state_dict], ids=["model", "state dict"])
def test_the_user_says_how_weights_hold_neurons(of):
    net = bare()
    neurons = {"dictionary.W": "columns", "embed": "rows", "first": 2, "head": first_half}
    found = WeightUniformity(reduction="none", neurons=neurons)(of(net))
    assert sorted(found) == ["dictionary.W", "embed", "first.0", "first.1", "head"]
    wanted = UniformityRegularizer(coefficient=0.0, neurons=neurons).attach(net).measure_layers()
    for one in wanted:
        assert float(found[one.name]) == pytest.approx(one.ratio, rel=1e-6)
    atoms = WeightUniformity(head=None)({"weight": net["dictionary"]["W"].detach().T})
    assert float(found["dictionary.W"]) == pytest.approx(float(atoms), rel=1e-6)


@pytest.mark.parametrize("of", [lambda net: net, nn.Module.state_dict], ids=["model", "state dict"])
def test_several_heads_are_measured_in_full_space(of):
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 4))
    metric = partial(WeightUniformity, HALF_SPACE, reduction="none")
    each = {name: metric(head=name)(of(net)) for name in "12"}
    none = metric(head=None)(of(net))
    both = metric(head=["1", "2"])(of(net))
    assert both == {"0": none["0"], "1": each["1"]["1"], "2": each["2"]["2"]}
    assert both["1"] != none["1"]
    assert both["2"] != none["2"]


@pytest.mark.parametrize("of", [lambda net: net, nn.Module.state_dict], ids=["model", "state dict"])
@pytest.mark.parametrize(
    ("neurons", "words"),
    [
        ({"frist": 2}, "'frist' matches no weight; did you mean 'first'"),
        ({"first": 3}, "do not divide into 3 equal parts"),
        ({"first": lambda weight: weight[0]}, "gave shape"),
    ],
)
def test_neurons_that_a_weight_does_not_hold(of, neurons, words):
    with pytest.raises(ValueError, match=words):
        WeightUniformity(neurons=neurons).update(of(bare()))


def test_a_measured_model_keeps_no_hooks():
    net = network()
    WeightUniformity().update(net.train())
    assert not net._forward_hooks


def spoil(net, *layers):
    with torch.no_grad():
        for i in layers:
            net[i].weight.zero_()
    return net


def test_layers_without_two_live_neurons_are_left_out():
    net = network()
    each = WeightUniformity(reduction="none")(spoil(net, 5))
    assert each["5"].isnan()
    others = torch.stack([each[name] for name in ("0", "2", "7")])
    assert torch.allclose(WeightUniformity()(net), others.mean())
    assert torch.equal(WeightUniformity(reduction="max")(net), others.max())
    assert WeightUniformity()(spoil(net, 0, 2, 5, 7)).isnan()


def test_several_updates_give_their_mean():
    nets = [network(), network(), spoil(network(), 5)]
    each = [WeightUniformity(reduction="none")(net) for net in nets]
    metric, by_forward = WeightUniformity(reduction="none"), WeightUniformity(reduction="none")
    for net, known in zip(nets, each, strict=True):
        metric.update(net)
        assert by_forward(net).keys() == known.keys()
        assert all(
            torch.equal(by_forward._forward_cache[name], known[name]) or known[name].isnan()
            for name in known
        )
    for name, x in metric.compute().items():
        values = torch.stack([known[name] for known in each])
        assert float(x) == pytest.approx(float(values.nanmean()), rel=1e-6)
        torch.testing.assert_close(by_forward.compute()[name], x, equal_nan=True)


def test_merged_updates_give_their_mean():
    nets = [network(), network(), spoil(network(), 5)]
    together, first, second = (WeightUniformity(reduction="none") for _ in range(3))
    for net in nets:
        together.update(net)
    first.update(nets[0])
    for net in nets[1:]:
        second.update(net)
    first.compute()
    first.merge_state(second)
    wanted = together.compute()
    assert first.compute().keys() == wanted.keys()
    assert all(torch.allclose(x, wanted[name]) for name, x in first.compute().items())


def test_another_model_is_refused():
    metric = WeightUniformity()
    metric.update(network())
    with pytest.raises(ValueError, match=r"same layers: got \['0'\] after \['0', '2', '5', '7'\]"):
        metric.update(nn.Sequential(nn.Linear(4, 4)))
    metric.reset()
    metric.update(nn.Sequential(nn.Linear(4, 4)))


def test_before_any_model():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert WeightUniformity().compute().isnan()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert WeightUniformity(reduction="none").compute() == {}


# --- torchmetrics' machinery ---


def test_a_collection_shares_states_only_where_they_are_the_same():
    x = embeddings()
    measures = {"gauss": GaussianPotential(), "riesz": RieszEnergy(), "koleo": KoLeo()}
    together = MetricCollection(
        {name: FeatureUniformity(measure, capacity=40) for name, measure in measures.items()}
        | {"angle": FeatureUniformity(quantity="min_angle", capacity=40)}
        | {f"large{c}": FeatureUniformity(capacity=c) for c in (1_000_000, 1_000_001, None)}
        | {"seed": FeatureUniformity(capacity=40, seed=1)}
    )
    for batch in x.split(10):
        together.update(batch)
    groups = sorted(sorted(group) for group in together.compute_groups.values())
    assert groups == [
        ["angle", "gauss", "koleo", "riesz"],
        ["large1000000"],
        ["large1000001"],
        ["largeNone"],
        ["seed"],
    ]
    found = together.compute()
    together(x[:20])
    again = together.compute()
    for name, metric in together.items():
        alone = FeatureUniformity(
            metric.measure, quantity=metric.quantity, capacity=metric.capacity, seed=metric.seed
        )
        assert float(found[name]) == value(alone, x, 10)
        assert float(again[name]) == value(alone, x[:20])
    together.reset()
    assert int(together["koleo"].seen) == 0


def test_a_collection_of_weights():
    net = network()
    together = MetricCollection(
        {
            "mean": WeightUniformity(),
            "max": WeightUniformity(reduction="max"),
            "near": WeightUniformity(RieszEnergy(s=2.0000001, half_space=True)),
        }
    )
    together.update(net)
    together.update(net)
    assert sorted(map(sorted, together.compute_groups.values())) == [["max", "mean"], ["near"]]
    found = together.compute()
    assert torch.equal(found["max"], WeightUniformity(reduction="max")(net))
    assert torch.equal(found["mean"], WeightUniformity()(net))


def makers():
    x, net = embeddings(), network()
    return [
        (FeatureUniformity, x[:30], x[30:]),
        (lambda: FeatureUniformity(capacity=20), x[:30], x[30:]),
        (lambda: FeatureUniformity(capacity=None, compute_on_cpu=True), x[:30], x[30:]),
        (WeightUniformity, net, network()),
    ]


@pytest.mark.parametrize("case", range(4))
def test_states_go_through_checkpoints_pickles_and_copies(case):
    make, first, second = makers()[case]
    through = make()
    through.update(first)
    through.update(second)
    known = through.compute()
    metric = make()
    assert metric.state_dict() == {}
    metric.persistent(True)
    metric.update(first)
    torch.save(metric.state_dict(), "state.pt")
    loaded = make()
    loaded.load_state_dict(torch.load("state.pt", weights_only=True))
    for copied in (
        loaded,
        pickle.loads(pickle.dumps(metric)),
        metric.clone(),
        copy.deepcopy(metric),
        metric.to("cpu"),
    ):
        copied.update(second)
        assert torch.equal(copied.compute(), known)
    metric.reset()
    metric.update(first)
    metric.update(second)
    assert torch.equal(metric.compute(), known)


def test_states_of_other_settings_are_not_loaded():
    metric = filled(FeatureUniformity(capacity=20), embeddings())
    metric.persistent(True)
    with pytest.raises(
        RuntimeError, match=r"saved with the settings \[20, 0\], this one has \[4096, 0\]"
    ):
        FeatureUniformity().load_state_dict(metric.state_dict())


@pytest.mark.parametrize("case", range(4))
def test_forward_gives_the_batch_and_goes_on(case):
    make, first, second = makers()[case]
    by_forward = make()
    by_update = make()
    alone = make()
    for batch in (first, second):
        alone.reset()
        alone.update(batch)
        assert torch.equal(by_forward(batch), alone.compute())
        by_update.update(batch)
    torch.testing.assert_close(by_forward.compute(), by_update.compute())


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_plots(quantity):
    metric = filled(FeatureUniformity(quantity=quantity), embeddings())
    figure, axes = metric.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in dotted] == ([1.0] if quantity == "ratio" else [])
    metric.plot([metric.compute(), metric.compute()], axes)
    each = WeightUniformity(quantity=quantity, reduction="none")
    each.update(network())
    for shown in (None, each.compute(), [each.compute(), each.compute()]):
        figure, axes = each.plot(shown)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "2", "5", "7"]
    matplotlib.pyplot.close("all")


class Watched(pl.LightningModule):
    """Logs both metrics, by object."""

    def __init__(self, capacity=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.features = FeatureUniformity(capacity=capacity)
        self.weights = WeightUniformity()
        self.seen = []

    def training_step(self, batch, batch_idx):
        z = self.net(batch)
        self.features(z)
        self.seen.append(z.detach())
        self.log("features", self.features, on_step=True, on_epoch=True)
        self.weights.update(self.net)
        self.log("weights", self.weights, on_step=False, on_epoch=True)
        return z.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_lightning_module_logs_both():
    module = Watched()
    fit = trainer(max_epochs=2)
    fit.fit(module, torch.utils.data.DataLoader(embeddings(40, 6), batch_size=8))
    logged = fit.callback_metrics
    last = torch.cat(module.seen[5:])
    assert float(logged["features_epoch"]) == pytest.approx(
        float(uniformity_ratio(GaussianPotential(), last)), rel=1e-5
    )
    assert float(logged["features_step"]) == pytest.approx(
        float(uniformity_ratio(GaussianPotential(), last[32:])), rel=1e-5
    )
    assert torch.allclose(logged["weights"], WeightUniformity()(module.net))
    assert int(module.features.seen) == 0


# --- ranks ---


def computed(metric):
    """The value, on a rank without data, too: torchmetrics warns there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before the ``update``")
        value = metric.compute()
    return value if isinstance(value, dict) else float(value)


def on_rank(capacity, dtype):
    """What each rank gets from its share, from nothing on rank 1, and from its own weights."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x, found = embeddings(101).to(dtype), SimpleNamespace()
    shared = filled(FeatureUniformity(capacity=capacity), x[rank::size], 9 + rank)
    found.shared = float(shared.compute())
    shared.update(x[rank::size] + 1.0)
    found.on = float(shared.compute())
    found.local = int(shared.seen)
    lonely, empty = FeatureUniformity(capacity=capacity), FeatureUniformity(capacity=capacity)
    if rank == 0:
        filled(lonely, x)
    empty.update(x[:0] if rank == 1 else x)
    found.lonely, found.empty = computed(lonely), computed(empty)
    found.step = float(FeatureUniformity(capacity=capacity, dist_sync_on_step=True)(x[rank::size]))
    weights, half = WeightUniformity(), WeightUniformity(reduction="none")
    net = network()
    weights.update(net)
    if rank == 0:
        half.update(net)
    found.weights = float(weights.compute())
    found.half = {name: float(x) for name, x in computed(half).items()}
    return found


@pytest.mark.parametrize(
    ("capacity", "dtype"), [(None, torch.float32), (30, torch.float32), (30, torch.bfloat16)]
)
def test_ranks_together_give_what_one_process_gives(capacity, dtype):
    x = embeddings(101).to(dtype)
    one = pytest.approx(value(FeatureUniformity(capacity=capacity), x), rel=1e-5)
    ends = world(2).run(on_rank, capacity, dtype)
    for found in ends:
        assert found.shared == found.step == one
        assert found.lonely == found.empty  # the same rows on one rank, places 0, 2, 4 and so on
        assert found.on != one
        if capacity is None:
            assert found.lonely == one
        else:
            assert found.lonely == pytest.approx(one.expected, rel=0.2)
    assert [found.local for found in ends] == [102, 100]
    torch.manual_seed(0)
    net = network()
    each = WeightUniformity(reduction="none")(net)
    for found in ends:
        assert found.weights == pytest.approx(float(WeightUniformity()(net)), rel=1e-6)
        assert found.half == pytest.approx({name: float(x) for name, x in each.items()}, rel=1e-6)


def unlike(_):
    rank = torch.distributed.get_rank()
    metric = FeatureUniformity()
    metric.update(embeddings(4, 5 + rank))
    try:
        metric.compute()
    except ValueError as error:
        return str(error)


def test_ranks_with_other_dimensions_are_told():
    for said in world(2).run(unlike, None):
        assert "shapes [(4, 5), (4, 6)]" in said


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.ConvTranspose2d(4, 8, 3),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)),
        lambda: nn.utils.weight_norm(nn.Linear(8, 5)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 5)),
        lambda: nn.LSTM(5, 8),
        lambda: nn.utils.prune.l1_unstructured(nn.Linear(8, 5), "weight", amount=0.3),
    ],
)
def test_weights_in_inference_mode_as_elsewhere(layer):
    model = nn.Sequential(layer(), nn.Embedding(7, 5, padding_idx=0)).eval()
    wanted = WeightUniformity(include="*")(model)
    with torch.inference_mode():
        found = WeightUniformity(include="*")(model)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_of_weights_do_not_depend_on_the_default_dtype(dtype):
    state = {"a.weight": torch.randn(6, 8), "b.weight": torch.ones(6, 8) + 1e-3 * torch.randn(6, 8)}
    wanted = WeightUniformity(RieszEnergy(s=2, softening=0), quantity="energy")(state)
    assert float(wanted) > 66_000  # beyond float16
    torch.set_default_dtype(dtype)
    try:
        found = WeightUniformity(RieszEnergy(s=2, softening=0), quantity="energy")(state)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*before.*update:UserWarning")
@pytest.mark.parametrize("kind", [WeightUniformity, FeatureUniformity])
def test_what_is_no_such_metric_is_not_merged(kind):
    for other in (MeanMetric(), {"x": torch.tensor(1)}):
        with pytest.raises(ValueError, match=f"only a {kind.__name__} can be merged"):
            kind().merge_state(other)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert kind().compute().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_infinite_ratio_of_weights_is_not_left_out():
    state = {"a.weight": torch.randn(6, 8), "b.weight": torch.ones(6, 8)}
    for reduction in ("mean", "max"):
        assert float(
            WeightUniformity(RieszEnergy(s=20, softening=0), reduction=reduction)(state)
        ) == float("inf")


def test_weights_of_other_settings_are_not_merged():
    model = nn.Linear(8, 6)
    first = WeightUniformity()
    second = WeightUniformity()
    other = WeightUniformity(quantity="min_angle")
    first.update(model)
    second.merge_state(first)
    assert float(second.compute()) == float(first.compute())
    others = [
        WeightUniformity(**one)
        for one in (
            {"include": "*"},
            {"exclude": "2"},
            {"head": None},
            {"head": ["2"]},
            {"measure": KoLeo()},
            {"neurons": {"0": "columns"}},
            {"neurons": {"0": first_half}},
        )
    ]
    for one in (other, *others):
        one.update(nn.Sequential(model, nn.ReLU(), nn.Linear(6, 5)))
        with pytest.raises(ValueError, match="only metrics of the same settings can be merged"):
            one.merge_state(first)


def test_weights_merge_where_neurons_are_the_same():
    model = nn.Linear(8, 6)
    for how in ("columns", 2, first_half):
        first, second, other = (
            WeightUniformity(neurons={"weight": one}) for one in (how, how, lambda weight: weight)
        )
        for one in (first, second):
            one.update(model)
        second.merge_state(first)
        assert float(second.compute()) == pytest.approx(float(first.compute()), rel=1e-6)
        with pytest.raises(ValueError, match="only metrics of the same settings can be merged"):
            other.merge_state(first)
