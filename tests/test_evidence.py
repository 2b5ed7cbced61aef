"""The harness of `make evidence`: its networks are ordinary ones, its protocol is what it says, it goes on after a kill."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from evidence import cells as running
from evidence import controls, tolerance, training
from evidence import probe as probing
from evidence.__main__ import MINIATURE, _run, main
from evidence.comparisons import compare, hypothesis
from evidence.data import draw, load
from evidence.documents import page, quoted, write
from evidence.files import write_whole
from evidence.grid import Trial
from evidence.headline import five_lines
from evidence.methods import HALF_MHE, METHODS, unit_coefficient
from evidence.networks import Architecture, Networks
from evidence.plan import FAMILY, SETTINGS, TEST_SEEDS, TUNING_SEEDS, Cell, Setting, cells
from evidence.statistics import holm, interval, paired, rank_correlation
from evidence.training import BATCH, Trained, _finite, train
from lightning_hsu import UniformityRegularizer

ROOT = Path(__file__).parents[1]
TINY = Setting("digits", 200, 2, held_out=200)


def digits_in_double():
    data = load("digits")
    pool = data.pool[0].double(), data.pool[1]
    test = data.test[0].double(), data.test[1]
    return replace(data, pool=pool, test=test)


def train_and_keep(monkeypatch, *args):
    """Train for the test images; return what training found and the networks it left."""
    kept = []

    def made(*args, **kwargs):
        kept.append(Networks(*args, **kwargs))
        return kept[0]

    with monkeypatch.context() as patch:
        patch.setattr(training, "Networks", made)
        found = train(*args, test=True)
    (networks,) = kept
    return found, networks


def parameters_of(networks, trial, seed):
    """The parameters of one of the networks, in the order that PyTorch's own layers have them."""
    found = []
    for side in (*networks.hidden, networks.head):
        weight, bias = (side.joined(name)[seed, trial].detach() for name in ("weight", "bias"))
        if networks.architecture.norm and side is not networks.head:
            gain = side.joined("gain")[seed, trial].detach()
            found += [weight, gain, bias]
        else:
            found += [weight, bias]
    return found


def in_own_layers(networks, trial, seed):
    """One of the networks, in PyTorch's own layers."""
    architecture = networks.architecture
    layers = []
    for shape in architecture.weights()[:-1]:
        n, d = shape[:2]
        if architecture.convolutions:
            layers.append(nn.Conv2d(d, n, 3, stride=2, padding=1, bias=not architecture.norm))
        else:
            layers.append(nn.Linear(d, n))
        if architecture.norm:
            layers.append(nn.BatchNorm2d(n))
        layers.append(nn.ReLU())
    if architecture.convolutions:
        layers.append(nn.Flatten())
    classes, d = architecture.weights()[-1]
    network = nn.Sequential(*layers, nn.Linear(d, classes))
    for parameter, value in zip(
        network.parameters(), parameters_of(networks, trial, seed), strict=True
    ):
        parameter.data.copy_(value)
    return network


def without_the_penalty(network, optimizer):
    """A copy of a network, and an optimizer of it with the same settings."""
    other = copy.deepcopy(network)
    settings = {name: optimizer.defaults[name] for name in ("lr", "weight_decay")}
    if isinstance(optimizer, torch.optim.SGD):
        settings["momentum"] = 0.9
    return other, type(optimizer)(other.parameters(), **settings)


def take_over(network, optimizer, other, twin):
    """Give the copy the weights, the task's gradients and the learning rate."""
    for theirs, ours in zip(other.parameters(), network.parameters(), strict=True):
        theirs.data.copy_(ours.data)
        theirs.grad = ours.grad.clone()
    twin.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]


def keep_a_half(network, other, twin, keep):
    """Neuron by neuron, the direction of one network and the norm of the other."""
    twin.step()
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            plain = other.get_parameter(name)
            direction, norm = (weight, plain) if keep == "direction" else (plain, weight)
            for i in range(len(weight)):
                unit = direction.data[i] / direction.data[i].norm()
                weight.data[i] = unit * norm.data[i].norm()


def train_alone(network, images, labels, setting, method, trial, seed):
    """Train one network of PyTorch's own layers for two epochs, as a user writes it."""
    if setting.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            network.parameters(), lr=trial.rate, weight_decay=trial.decay, momentum=0.9
        )
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=trial.rate, weight_decay=trial.decay)
    batches = setting.images // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * batches)
    engine = UniformityRegularizer(method.measure, trial.coefficient).attach(network)
    twin = without_the_penalty(network, optimizer)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(2):
        order = torch.randperm(setting.images, generator=chance)
        for i in range(batches):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            if method.apply == "loss":
                engine.add_to_loss(loss, optimizer)
                engine.count_step(optimizer)
            loss.backward()
            if method.keep:
                take_over(network, optimizer, *twin)
            if method.apply == "gradient":
                engine.add_gradients(optimizer)
            optimizer.step()
            if method.keep:
                keep_a_half(network, *twin, method.keep)
            if method.apply == "decoupled":
                engine.move(optimizer)
            schedule.step()
    network.eval()


# For float64. Measured: at most 2e-15 of either kind, with the instruction sets of `make cpus`,
# one thread and two.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
LESS_THAN_AN_IMAGE = 50 / 797  # in percent, of the test images


@pytest.mark.usefixtures("_double")
@pytest.mark.filterwarnings("ignore:the penalty is too strong")  # so that it is not missed
@pytest.mark.parametrize("how", ["gradient", "loss", "decoupled", "random", "direction", "length"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("network", ["plain", "convolutions", "batch norm"])
def test_a_network_among_many_trains_as_one_alone(network, optimizer, how, monkeypatch):
    data = digits_in_double()
    setting = replace(TINY, network=network, optimizer=optimizer, scale=0.1, noise=0.2)
    method = METHODS["half_mhe_2" if how == "gradient" else how]
    # Noise of one network must not depend on how many there are.
    monkeypatch.setattr(controls, "_noise", lambda like: like.flip(-1).roll(1, -1))
    rate = 0.05 if optimizer == "sgd" else 3e-3
    c = 200.0 if (optimizer, how) == ("adamw", "decoupled") else 20.0
    trials = [
        Trial(rate, 1e-3, 0.0, c),
        Trial(rate / 2, 1e-2, 0.0, 3 * c),
        Trial(rate, 1e-3),
        Trial(rate / 2, 1e-2),
    ]
    seeds = (3, 4, 5)
    many, networks = train_and_keep(monkeypatch, data, setting, method, trials, seeds)
    with_penalty, without = many.after.tensor_split(2)
    if how in ("random", "length"):
        norms = networks.hidden[0].joined("weight").detach().flatten(2).norm(dim=-1)
        with_penalty, without = norms.T.tensor_split(2)
    assert (abs(with_penalty - without) > 1e-3).all()  # the penalty is there

    # Without a penalty, and with one of strength 0.
    without, plain = train_and_keep(monkeypatch, data, setting, METHODS["decay"], trials[2:], seeds)
    assert torch.allclose(without.error, many.error[2:], rtol=0, atol=LESS_THAN_AN_IMAGE)
    assert torch.allclose(without.after, many.after[2:], **CLOSE)
    for t, s in itertools.product(range(2), range(3)):
        ours, theirs = parameters_of(networks, 2 + t, s), parameters_of(plain, t, s)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, **CLOSE)

    for t, s in ((0, 1), (1, 2), (3, 0)):
        drawn = draw(data, seeds[s], setting.images, setting.held_out, noise=0.2)
        images, labels = drawn.train
        test_images, test_labels = drawn.test
        if network != "plain":
            images = images.view(-1, *data.shape)
            test_images = test_images.view(-1, *data.shape)
        begin = Networks(setting.architecture(data), 1, seeds[s : s + 1])
        alone = in_own_layers(begin, 0, 0)
        train_alone(alone, images, labels, setting, method, trials[t], seeds[s])
        for one, other in zip(parameters_of(networks, t, s), alone.parameters(), strict=True):
            assert torch.allclose(one, other, **CLOSE)
        error = 100 * (alone(test_images).argmax(1) != test_labels).double().mean()
        assert abs(float(error - many.error[t, s])) < LESS_THAN_AN_IMAGE
        *hidden, _head = UniformityRegularizer(HALF_MHE).attach(alone).measure_layers()
        ratio = sum(layer.ratio for layer in hidden) / len(hidden)
        assert math.isclose(ratio, float(many.after[t, s]), rel_tol=1e-7)


@pytest.mark.usefixtures("_double")
def test_a_share_acts_on_each_network_by_itself():
    data = digits_in_double()
    trials = [Trial(0.2, 1e-3), Trial(0.3, 1e-3)]
    setting = replace(TINY, scale=0.1, epochs=30)
    many = train(data, setting, METHODS["share"], trials, (0, 1), test=False)
    without = train(data, setting, METHODS["decay"], trials, (0, 1), test=False)
    assert (many.after < without.after - 5e-3).all()
    for t, s in ((0, 1), (1, 0)):
        alone = train(data, setting, METHODS["share"], [trials[t]], (s,), test=False)
        assert math.isclose(float(alone.after[0, 0]), float(many.after[t, s]), rel_tol=1e-7)


@pytest.mark.usefixtures("_double")
def test_a_network_that_diverges_leaves_the_others_alone():
    data = digits_in_double()
    method = METHODS["half_mhe_2"]
    calm, wild = (Trial(rate, 1e-3, 0.0, 1.0) for rate in (0.05, 1e4))
    both = train(data, TINY, method, [calm, wild], (0, 1), test=False)
    alone = train(data, TINY, method, [calm], (0, 1), test=False)
    assert both.finite.tolist()[0] == [True, True]
    assert torch.allclose(both.error[:1], alone.error, rtol=0, atol=LESS_THAN_AN_IMAGE)
    assert torch.allclose(both.after[:1], alone.after, **CLOSE)
    assert (both.error[1] > 50).all()


def test_finite_is_told_network_by_network():
    networks = Networks(Architecture((1, 8, 8), 10), 3, (0, 1))
    with torch.no_grad():
        networks.hidden[1][2].weight[1, 0, 0] = math.nan
        networks.head[0].bias[0, 0] = math.inf
    assert _finite(networks).tolist() == [[False, True], [True, True], [True, False]]


def test_a_cell_is_tuned_on_tuning_seeds_and_tested_once(monkeypatch):
    calls = []

    def recorded(data, setting, method, trials, seeds, *, test):
        calls.append((list(trials), tuple(seeds), test))
        error = torch.full((len(trials), len(seeds)), 50.0 + test)
        if not test:
            error[5] = 40.0  # the best, inside the grid
            error[3] = torch.tensor([1.0, 60.0, 60.0])  # lucky on one seed
            error[2] = 30.0  # not finite: its answers are all one class
            error[12] = 99.0
        early = torch.ones(2, *error.shape)
        return Trained(
            error,
            0.1 * error,
            (error < 60) & (error != 30.0),
            error / 10,
            torch.full_like(error, math.nan if test else 2.0),
            early_ratio=early,
            early_share=0.5 * early,
        )

    monkeypatch.setattr(running, "train", recorded)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of all tests after this
    cell = Cell(TINY, METHODS["half_mhe_2"])
    found = running.run(cell, (1, 2, 3), (7, 8))
    trials = cell.trials(load("digits"))
    tested = ([trials[5]], (7, 8), True)  # the cell's, and both of the matched controls'
    assert calls == [(trials, (1, 2, 3), False), tested, tested, tested]
    assert [*found["matched"]] == ["random", "length"]
    assert found["matched"]["random"]["test_error"] == [51.0, 51.0]
    assert found["chosen"] == asdict(trials[5])
    assert found["trials"] == [asdict(trial) for trial in trials]
    assert found["test_error"] == [51.0, 51.0]
    assert found["validation_error"][5] == [40.0, 40.0, 40.0]
    assert found["validation_error"][2] == [running.BROKEN] * 3
    assert (found["nonfinite"], found["tuning_nonfinite"]) == (0, 8)
    assert found["tuning_early_ratio"] == [1.0] * 16
    assert found["ratio_after"] == [None, None]  # JSON has no NaN
    assert (found["early_ratio"], found["early_share"]) == ([1.0, 1.0], [0.5, 0.5])
    assert "first" not in found


def landscape(best):
    """A training whose error is the distance, on a logarithmic scale, from the best values."""

    def train(data, setting, method, trials, seeds, *, test):
        errors = []
        for trial in trials:
            far = [abs(math.log(getattr(trial, axis) / best[axis])) for axis in best]
            errors.append([sum(far) + 0.01 * seed for seed in seeds])
        error = torch.tensor(errors)
        return Trained(error, error, error >= 0, error, error)

    return train


@pytest.mark.parametrize(
    ("best", "rounds", "left"),
    [
        ({"rate": 0.08, "decay": 1e-2, "strength": 0.2}, 0, []),
        ({"rate": 0.7, "decay": 1e-2, "strength": 1e-2}, 2, []),
        ({"rate": 0.08, "decay": 1e-4, "strength": 3.0}, 3, []),
        ({"rate": 0.08, "decay": 1e-2, "strength": 1e6}, 4, ["largest strength"]),
        ({"rate": 1e-9, "decay": 1e9, "strength": 0.1}, 8, ["smallest rate", "largest decay"]),
    ],
)
def test_grids_are_widened_until_the_best_lies_inside(best, rounds, left, monkeypatch):
    monkeypatch.setattr(running, "train", landscape(best))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    cell = Cell(TINY, METHODS["half_mhe_2"])
    found = running.run(cell, (1, 2), (7, 8, 9))
    assert found["edges"] == left
    assert len(found["trials"]) == len(found["validation_error"]) >= 16 + 4 * rounds
    if rounds:
        assert found["first"]["edges"]
        assert sum(found["test_error"]) < sum(found["first"]["test_error"])
    for axis, value in best.items():  # as near as the steps of that axis allow
        if all(axis not in edge for edge in left):
            assert 1 / 4.1 < found["chosen"][axis] / value < 4.1


def test_every_method_has_the_same_budget_and_seeds_are_apart():
    assert len(SETTINGS) == len(set(SETTINGS)) >= 40
    assert not set(TUNING_SEEDS) & set(TEST_SEEDS)
    names = [cell.name for cell in cells()]
    assert len(names) == len(set(names))
    data = load("digits")
    for method in METHODS.values():
        trials = Cell(TINY, method).trials(data)
        assert len({(trial.rate, trial.decay) for trial in trials}) == 16
        if method.measure and not method.share:
            assert len({(trial.rate, trial.strength) for trial in trials}) == 16
            assert len({(trial.decay, trial.strength) for trial in trials}) == 16
    assert set(FAMILY) <= set(SETTINGS)
    for setting in SETTINGS:
        if setting.data == "digits":
            tried = [
                {(one.rate, one.decay) for one in Cell(setting, method).trials(data)}
                for method in METHODS.values()
            ]
            assert all(one == tried[0] for one in tried)


def test_a_unit_of_strength_is_a_unit_gradient_in_a_cone():
    for name in ("half_mhe_2", "mgd", "orthogonality", "koleo"):
        chance = torch.Generator().manual_seed(0)
        axis, x = (
            nn.functional.normalize(torch.randn(rows, 40, generator=chance), dim=-1)
            for rows in (1, 64)
        )
        x = nn.functional.normalize(axis + x, dim=-1).double().requires_grad_()
        measure = METHODS[name].measure
        (grad,) = torch.autograd.grad(unit_coefficient(measure, 64, 40) * measure.penalty(x), x)
        assert math.isclose(float(grad.square().sum(-1).mean()), 1.0, rel_tol=1e-3)


def test_fewer_images_than_a_batch_are_no_training(tmp_path):
    with pytest.raises(ValueError, match="less than one batch"):
        train(
            load("digits"),
            replace(TINY, images=30),
            METHODS["decay"],
            [Trial(0.1, 0.0)],
            (1,),
            test=True,
        )


def test_statistics_against_numbers_known_by_hand():
    found = paired([1.0, 2.0, 3.0, 2.0], [2.0, 2.5, 3.0, 4.0])
    assert (found.mean, found.wins, found.seeds) == (-0.875, 3, 4)
    assert math.isclose(found.error, 0.426956, rel_tol=1e-5)
    assert math.isclose(found.p, 0.132747, rel_tol=1e-3)
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    x = list(range(20))
    assert math.isclose(rank_correlation(x, [i**3 for i in x], 200).low, 1.0)
    chance = np.random.default_rng(1)
    none = rank_correlation(chance.normal(size=50), chance.normal(size=50), 2000)
    assert none.low < 0 < none.high


def test_equal_differences_are_no_evidence_whatever_their_last_digits():
    without = [10.1, 12.5, 9.48]
    assert len({round(x + 0.2, 2) - x for x in without}) > 1  # as they are computed
    found = paired([round(x + 0.2, 2) for x in without], without)
    assert (found.error, found.p, found.wins) == (0.0, 1.0, 0)
    assert math.isclose(found.mean, 0.2)
    low, high = interval([round(x + 0.2, 2) for x in without], without)
    assert low == high == found.mean


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([1.0, 2.0, 3.0], [4.0] * 3),
        ([1.0, math.nan, 3.0, 2.0], [1, 2, 3, 4]),
    ],
)
def test_a_correlation_of_what_does_not_vary_is_not_known(x, y):
    found = rank_correlation(x, y, 100)
    assert all(math.isnan(value) for value in (found.rho, found.low, found.high))
    assert found.count == len(x)


def test_tables_of_settings_in_which_nothing_is_wrong(tmp_path):
    found = results([0.0] * 6, [2.0] * 6)
    for one in found:
        one["test_error"] = [0.0] * 5
    assert write(found, 12, tmp_path, "A remark.") == (tmp_path / "ratio.png",)  # no controls
    told = (tmp_path / "tables.md").read_text()
    assert "| half-space MHE, s = 2 | 6 | 0 | 6 | 0 | +0.00 | +0.00 | +0.00 | 0 |" in told
    assert told.splitlines()[2] == "**A remark.**"


def begun(module, arguments, cwd):
    """A process that runs a module, silently."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(is_there):
    """Wait for a first result, five minutes at most."""
    for _ in range(6000):
        if is_there():
            return
        time.sleep(0.05)
    pytest.fail("no result in five minutes")


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--only", "depth2-scale1--", "--jobs", "1"]
    out = tmp_path / "out/evidence-quick"
    with begun("evidence", arguments, tmp_path) as run:
        wait_for(lambda: list(out.glob("cells/*.json")))
        run.kill()
    time.sleep(3)  # the worker ends, too
    known = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    assert 1 <= len(known) < 6
    monkeypatch.setattr(sys, "argv", ["evidence", *arguments])
    assert main() == 0
    printed = capsys.readouterr().out
    assert f"{len(known)} done before" in printed
    assert MINIATURE in printed
    assert MINIATURE in (out / "tables.md").read_text()
    assert all(path.stat().st_mtime_ns == when for path, when in known.items())
    assert "6 of 6 cells, 5 comparisons" in (out / "tables.md").read_text()
    assert len(json.loads((out / "cells.json").read_text())) == 6


NONE_IS_RUN = ["evidence", "--quick", "--only", "decay", "--minutes", "0", "--jobs", "1"]


def test_what_is_not_done_in_time_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*NONE_IS_RUN, "--out", str(tmp_path)])
    assert main() == 3
    assert "4 cells are left. Cells that are done are kept" in capsys.readouterr().err


def test_what_a_run_would_write_over_is_told_first(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells" / "digits-n200-e4-depth2-scale1--decay.json"
    running.save({"name": path.stem, "asked": {"setting": "of other data"}}, path.parent)
    monkeypatch.setattr(sys, "argv", [*NONE_IS_RUN, "--out", str(tmp_path)])
    assert main() == 3
    told = capsys.readouterr().err
    assert "Not taken: 1 files there of other data" in told
    assert "another --out keeps them" in told


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "the same command, without --tables, goes on"),
        (BrokenProcessPool("A process ended."), 3, "fewer --jobs take less"),
        (OSError(28, "No space left on device"), 2, "make room, or name another --out"),
    ],
)
def test_what_ends_a_run_is_told_with_a_way_on(
    tmp_path, monkeypatch, capsys, error, status, message
):
    def fails(*_):
        raise error

    monkeypatch.setattr("evidence.__main__._run", fails)
    monkeypatch.setattr(sys, "argv", [*NONE_IS_RUN, "--out", str(tmp_path)])
    assert main() == status
    assert message in capsys.readouterr().err


@pytest.mark.any_cpu
def test_a_cell_that_fails_is_told_and_does_not_end_the_others(tmp_path, capsys):
    bad, good = (Cell(replace(TINY, images=images), METHODS["decay"]) for images in (100_000, 200))
    _run([bad, good], [1], [2], tmp_path, 1, 60.0)
    assert f"{bad.name} failed: " in capsys.readouterr().err
    assert [path.stem for path in tmp_path.iterdir()] == [good.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--commit"], "--commit takes the whole plan"),
        (["--only", "digits", "--commit"], "--commit takes the whole plan"),
        (["--quick", "--data", "x"], "leave out --data"),
        (["--quick", "--jobs", "0"], "--jobs is 1 or more"),
        (["--quick", "--only", "nosuch"], "no cell's name contains 'nosuch'"),
        (["--data", ""], "--data is empty"),
        (["--quick", "--minutes", "0", "--out", __file__], "name another --out"),
    ],
)
def test_what_cannot_be_asked_for(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["evidence", *arguments])
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main())
    assert message in capsys.readouterr().err


def test_missing_data_has_a_way_out(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence", "--data", "/nowhere"])
    assert main() == 2
    assert "Ways out" in capsys.readouterr().err


def results(gains, ratios):
    """Cells with known gains."""
    found = []
    for i, (gain, ratio) in enumerate(zip(gains, ratios, strict=True)):
        setting = {
            "data": "digits",
            "images": i,
            "epochs": 1,
            "network": "plain",
            "depth": 2,
            "scale": 1.0,
        }
        setting |= {"optimizer": "sgd", "noise": 0.0, "imbalance": 1.0}
        for name, change in (("decay", 0.0), ("half_mhe_2", -gain)):
            asked = {"setting": setting, "method": {"name": name}}
            own = {"asked": asked, "name": f"{i}-{name}", "nonfinite": 0}
            errors = [10.0 + seed + change + 0.01 * seed * (name != "decay") for seed in range(5)]
            found.append(
                own
                | {
                    "test_error": errors,
                    "ratio_before": [1.0 + i] * 5,
                    "ratio_after": [ratio] * 5,
                    "edges": [],
                    "seconds": 1.0,
                }
            )
    return found


def test_tables_say_gain_null_and_worse(tmp_path):
    found = results([3.0, 2.0, 1.0, 0.02, -1.0, 0.5], [5.0, 4.0, 3.0, 1.1, 1.0, 2.0])
    comparisons = compare(found)
    assert [one.verdict for one in comparisons] == ["gain", "gain", "gain", "null", "worse", "gain"]
    assert [one.failed for one in comparisons] == [False] * 4 + [True, False]
    assert hypothesis(comparisons, "half_mhe_2").rho == 1.0
    write(found, 12, tmp_path)
    assert "remark" not in (tmp_path / "tables.md").read_text()
    assert "| half-space MHE, s = 2 | 6 | 4 | 1 | 1 |" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "ratio.png").stat().st_size > 10_000


def test_tables_say_where_and_against_whom(tmp_path):
    found = results([3.0, 2.0, 1.0, 0.02, -1.0, 0.5], [5.0, 4.0, 3.0, 1.1, 1.0, 2.0])
    for one in found[:2]:  # weight decay alone hardly trains there
        one["test_error"] = [80.0 + error for error in one["test_error"]]
    rivals = [
        json.loads(json.dumps(one))
        for one in found
        if one["asked"]["method"]["name"] == "half_mhe_2"
    ]
    for one in rivals:
        one["asked"]["method"]["name"] = "orthogonality"
        one["test_error"] = [
            error + 1.0 + 0.01 * seed for seed, error in enumerate(one["test_error"])
        ]
    found[1]["edges"] = ["largest rate", "smallest strength"]
    write(found + rivals, 18, tmp_path)
    said = (tmp_path / "tables.md").read_text()
    assert "| weight decay alone trains | 5 | 3–1–1, -0.48 | 1–1–3, +0.54 |" in said
    assert "| PyTorch's initial scale | 5 |" in said
    assert "| weight decay alone hardly trains | 1 | 1–0–0, -2.98 | 1–0–0, -1.96 |" in said
    assert "| half-space MHE, s = 2 | orthogonality | 6 | 6 | 0 | -1.02 |" in said
    assert said.count("r↑ s↓") == 1
    assert "initial scale 0.03" not in said


def test_readme_and_docs_quote_the_committed_results():
    committed = json.loads((ROOT / "evidence/results/cells.json").read_text())
    for name, block in (("README.md", five_lines), ("docs/evidence.md", page)):
        text = (ROOT / name).read_text()
        assert quoted(text, block(committed)) == text


def test_its_own_readme_quotes_the_committed_results_of_kept_gradients():
    committed = json.loads((tolerance.RESULTS / "cells.json").read_text())
    assert len(committed) == len(tolerance.CHOSEN) * len(tolerance.TOLERANCES)
    text = tolerance.README.read_text()
    assert quoted(text, tolerance.table(committed), tolerance.MARKS) == text


def test_kept_gradients_are_compared_on_paired_seeds_and_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tolerance", "--quick", "--out", str(tmp_path)])
    assert tolerance.main() == 0
    told = capsys.readouterr().out
    cells = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("cells/*.json"))]
    assert [one["asked"]["method"]["tolerance"] for one in cells] == [None, 0.05, 0.1]
    exact, kept, _ = cells
    assert exact["ratio_before"] == kept["ratio_before"]  # the same initial weights
    assert exact["recomputed"] == 1.0 > kept["recomputed"] > 0.0
    monkeypatch.setattr(tolerance, "train", None)  # nothing is left to do
    assert tolerance.main() == 0
    assert capsys.readouterr().out == told[told.index("| setting") :]


def test_its_own_readme_quotes_the_committed_probes():
    committed = json.loads(probing.RESULTS.read_text())
    assert [one["name"] for one in committed] == [one.name for one in SETTINGS]
    text = probing.README.read_text()
    assert quoted(text, probing.table(committed), probing.MARKS) == text


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(("network", "optimizer"), [("plain", "adamw"), ("batch norm", "sgd")])
def test_a_probe_measures_what_a_plain_loop_does(network, optimizer):
    data = digits_in_double()
    setting = replace(TINY, network=network, optimizer=optimizer, epochs=3)
    trial = Trial(0.02, 0.01)
    seeds = (3, 4)
    found = probing.probe(data, setting, trial, seeds, steps=6)  # into the second epoch
    for s, seed in enumerate(seeds):
        begin = Networks(setting.architecture(data), 1, seeds[s : s + 1])
        alone = in_own_layers(begin, 0, 0)
        images, labels = draw(data, seed, setting.images, setting.held_out).train
        if network != "plain":
            images = images.view(-1, *data.shape)
        assert torch.allclose(
            found[:, s], probed_alone(alone, images, labels, setting, trial, seed)
        )


def probed_alone(network, images, labels, setting, trial, seed):
    """Six steps of one network; the last running means' ratio in each hidden layer."""
    if setting.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            network.parameters(), lr=trial.rate, weight_decay=trial.decay, momentum=0.9
        )
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=trial.rate, weight_decay=trial.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    chance = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(setting.images, generator=chance) for _ in range(2)])
    hidden = [layer.weight for layer in network if isinstance(layer, nn.Linear | nn.Conv2d)][:-1]
    means = None
    for chosen in order.split(BATCH)[:6]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        now = []
        for weight in hidden:
            (penalty,) = torch.autograd.grad(HALF_MHE.penalty(weight.flatten(1)), weight)
            now.append([float(weight.grad.norm()), float(penalty.norm())])
        now = np.array(now)
        means = now if means is None else 0.9 * means + 0.1 * now
        optimizer.step()
        schedule.step()
    return torch.tensor(means[:, 0] / means[:, 1])


def test_a_probe_is_worth_shipping_only_if_it_is_right_and_better_than_one_strength():
    coefficients = (0.2, 0.8, 3.4, 14.0)
    right, reversed_ = [], []
    for i in range(24):
        best = i % 4
        errors = tuple(10.0 + abs(j - best) + 0.01 * i for j in range(4))
        made = probing.Found("", 0.0, coefficients, errors, coefficients[best], True, True)
        right.append(replace(made, ratio=1.2 * coefficients[best] / 0.05))
        reversed_.append(replace(made, ratio=coefficients[3 - best] / 0.05))
    assert [one.nearest() for one in right] == [i % 4 for i in range(24)]
    assert probing.single_best(right) in (1, 2)
    assert probing.worth_shipping(right) == (True, True)
    assert "**worth shipping**" in probing.verdict(right)
    assert probing.worth_shipping(reversed_) == (False, False)
    assert "**not worth shipping**" in probing.verdict(reversed_)
    constant = [replace(one, ratio=67.0 + i) for i, one in enumerate(right)]
    assert probing.worth_shipping(constant)[1] is False  # it is one strength for all


def test_a_quick_probe_prints_its_verdict(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe", "--quick"])
    monkeypatch.setattr(probing, "probe", partial(probing.probe, steps=1))
    assert probing.main() == 0
    told = capsys.readouterr().out
    assert f"| all | {sum(one.data == 'digits' for one in SETTINGS)} |" in told
    assert "shipping**" in told
    monkeypatch.setattr(sys, "argv", ["probe", "--quick", "--commit"])
    with pytest.raises(SystemExit):
        probing.main()
    assert "leave out --quick" in capsys.readouterr().err


def test_intervals_do_not_depend_on_the_order_of_settings():
    chance = np.random.default_rng(2)
    x, y = chance.normal(size=(2, 20))
    assert rank_correlation(x, y, 500) == rank_correlation(x[::-1], y[::-1], 500)


def test_a_result_asked_otherwise_is_not_taken(tmp_path):
    cell = Cell(TINY, METHODS["decay"])
    wanted = running.asked(cell, (1, 2), (3, 4))
    running.save({"name": cell.name, "asked": wanted}, tmp_path)
    assert running.kept(tmp_path, cell, wanted)
    assert not running.kept(tmp_path, cell, running.asked(cell, (1, 2), (3, 5)))
    for content in (b"{", b"", b"\xff\xfe", b"[1]", b"null"):
        (tmp_path / f"{cell.name}.json").write_bytes(content)
        assert not running.kept(tmp_path, cell, wanted)


def test_a_file_is_written_whole_beside_another_process_that_writes_it(tmp_path, monkeypatch):
    """Each has a part of its own, and none is left."""
    monkeypatch.setattr(os, "getpid", Mock(side_effect=[1, 2]))
    plain = Path.replace

    def replace(part, path):
        monkeypatch.setattr(Path, "replace", plain)
        write_whole(path, "other")
        return plain(part, path)

    monkeypatch.setattr(Path, "replace", replace)
    write_whole(tmp_path / "a.json", "own")
    assert (tmp_path / "a.json").read_text() == "own"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("factor", "is_taken"), [(1 + 1e-6, True), (1 + 1e-3, False)])
def test_a_result_of_another_machine_is_taken(factor, is_taken, tmp_path):
    """A coefficient is computed in float32, whose last digits differ."""
    cell = Cell(TINY, METHODS["random"])
    wanted = running.asked(cell, (1, 2), (3, 4))
    made = json.loads(json.dumps(wanted))
    made["trials"][5]["coefficient"] *= factor
    running.save({"name": cell.name, "asked": made}, tmp_path)
    assert running.kept(tmp_path, cell, wanted) is is_taken
