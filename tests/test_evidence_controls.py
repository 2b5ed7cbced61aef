"""The controls of the evidence: what they leave out of a penalty, and what is left of it beyond them."""

import math
from dataclasses import replace
from statistics import mean

import pytest
import torch
from scipy import stats
from torch import nn

from evidence import control_tables
from evidence.comparisons import compare, failing
from evidence.controls import Halves, RandomDirection
from evidence.data import draw, load
from evidence.grid import Trial
from evidence.headline import five_lines
from evidence.methods import CONTROLS, HALF_MHE, METHODS, unit_coefficient
from evidence.methods import matched as controls_of
from evidence.networks import Networks
from evidence.pictures import controls_figure
from evidence.plan import Setting
from evidence.statistics import clustered_rank_correlation
from evidence.tables import change_cell
from evidence.training import train
from evidence.uniformity import before_widening, beyond_controls, clear_gains, early_and_gain
from lightning_hsu import UniformityRegularizer
from lightning_hsu.reference import uniformity_ratio
from tests.test_evidence import digits_in_double, in_own_layers

TINY = Setting("digits", 200, 2, held_out=200)


def in_a_cone(*shape):
    chance = torch.Generator().manual_seed(0)
    return 1.0 + torch.randn(*shape, generator=chance, dtype=torch.float64)


def test_a_random_direction_is_perpendicular_as_long_and_drawn_anew():
    x = in_a_cone(3, 16, 9)
    x[0] *= 0.1  # its gradient is ten times as long
    measure = RandomDirection(HALF_MHE)
    value, grad = HALF_MHE.value_and_grad(x)
    for _ in range(2):
        torch.manual_seed(5)
        same, drawn = measure.value_and_grad(x)
        _, other = measure.value_and_grad(x)
        assert torch.equal(same, value)
        for one in (drawn, other):
            assert torch.allclose(one.norm(dim=-1), grad.norm(dim=-1), rtol=1e-12)
            assert float((one * x).sum(-1).abs().max()) < 1e-12 * float(grad.norm())
        assert float(nn.functional.cosine_similarity(drawn, other, dim=-1).mean().abs()) < 0.2
    torch.manual_seed(5)
    assert torch.equal(measure.value_and_grad(x)[1], drawn)
    many = torch.stack([measure.value_and_grad(x)[1] for _ in range(400)])
    assert float(many.mean(0).norm() / grad.norm()) < 0.1  # on no side more than on another
    assert measure.for_head() == RandomDirection(HALF_MHE.for_head())
    assert math.isclose(
        unit_coefficient(measure, 64, 40), unit_coefficient(HALF_MHE, 64, 40), rel_tol=1e-6
    )


def test_noise_parts_what_has_collapsed_up_to_as_random_and_no_further():
    torch.manual_seed(0)
    x = 1.0 + 0.2 * torch.randn(64, 32)
    assert uniformity_ratio(HALF_MHE, x) > 3.0
    for _ in range(300):
        drawn = RandomDirection(HALF_MHE).value_and_grad(x)[1]
        x = x + 0.1 * x.norm(dim=-1, keepdim=True) * nn.functional.normalize(drawn, dim=-1)
    assert abs(float(uniformity_ratio(HALF_MHE, x)) - 1.0) < 0.05


def test_a_random_direction_of_zero_or_equal_neurons_is_finite():
    for x in (torch.zeros(4, 5), torch.ones(4, 5)):
        _, grad = RandomDirection(HALF_MHE).value_and_grad(x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("keep", ["direction", "length"])
def test_half_of_a_step_by_hand(keep):
    weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    bias = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight, bias], lr=0.5)
    halves = Halves(optimizer, [(weight, 1)], keep)
    optimizer.param_groups[0]["lr"] = 1.0  # as a schedule does
    weight.grad = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    bias.grad = torch.tensor([0.25])
    halves.before_penalty()
    weight.grad += torch.tensor([[0.0, -1.0], [-2.0, 0.0], [0.0, 0.0]])
    optimizer.step()
    halves.after_step()
    if keep == "direction":  # of (0.5, 1) and (2, 2), as long as 0.5 and 2
        known = [[0.5 / 5**0.5, 1.0 / 5**0.5], [2**0.5, 2**0.5], [0.0, 0.0]]
    else:  # of (0.5, 0) and (0, 2), as long as (0.5, 1) and (2, 2)
        known = [[1.25**0.5, 0.0], [0.0, 8**0.5], [0.0, 0.0]]
    assert torch.allclose(weight, torch.tensor(known))
    assert bias.tolist() == [0.75]  # what is not penalised is as it was


@pytest.mark.filterwarnings("ignore:the penalty is too strong")  # so that it shows
def test_controls_have_the_half_that_they_are_named_after():
    """From a small scale all that make neurons longer train, and only those that spread are spread."""
    data = load("digits")
    setting = replace(TINY, images=500, epochs=25, scale=0.03)
    before, after = {}, {}
    for name in ("decay", "half_mhe_2", *CONTROLS):
        strength = 100.0 if name == "decoupled" else 20.0
        trial = Trial(0.16, 1e-2, 0.2, strength)
        found = train(data, setting, METHODS[name], [trial], (1, 2, 3), test=False)
        before[name], after[name] = float(found.error.mean()), float(found.after.mean())
    for name in ("half_mhe_2", "random", "length"):
        assert before[name] < before["decay"] - 20.0
    for name in ("direction", "decoupled"):
        assert before[name] > before["half_mhe_2"] + 20.0
        assert after[name] < 0.99
    assert after["half_mhe_2"] < 0.99
    for name in ("random", "length"):
        assert after[name] > 0.99


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("epochs", [12, 1])
def test_what_is_seen_early_is_what_a_plain_loop_sees(epochs):
    """The ratio at a tenth of the steps, and norms of gradients summed over the ten before."""
    data = digits_in_double()
    setting = replace(TINY, images=500, epochs=epochs)  # 120 steps, seen at 3 to 12; or 10, at 1
    trials = [Trial(0.05, 1e-3, 0.0, 5.0), Trial(0.1, 1e-2, 0.0, 10.0)]
    found = train(data, setting, METHODS["half_mhe_2"], trials, (3, 4), test=True)
    drawn = draw(data, 4, 500, setting.held_out)
    images, labels = drawn.train
    alone = in_own_layers(Networks(setting.architecture(data), 1, (4,)), 0, 0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, weight_decay=1e-2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * epochs)
    engine = UniformityRegularizer(HALF_MHE, 10.0, share_limit=None).attach(alone)
    hidden = [layer for layer in alone if isinstance(layer, nn.Linear)][:-1]
    task, penalty = torch.zeros(2), torch.zeros(2)
    chance = torch.Generator().manual_seed(4)
    step = 0
    for _ in range(2):
        order = torch.randperm(500, generator=chance)
        for chosen in order.split(50):
            step += 1
            optimizer.zero_grad()
            nn.functional.cross_entropy(alone(images[chosen]), labels[chosen]).backward()
            before = [layer.weight.grad.clone() for layer in hidden]
            engine.add_gradients(optimizer)
            if step > epochs - 10:
                task += torch.stack([grad.norm() for grad in before])
                added = zip(hidden, before, strict=True)
                penalty += torch.stack([(one.weight.grad - grad).norm() for one, grad in added])
            if step == epochs:  # a tenth
                ratio = [uniformity_ratio(HALF_MHE, layer.weight.detach()) for layer in hidden]
                assert torch.allclose(found.early_ratio[:, 1, 1], torch.stack(ratio))
                assert torch.allclose(found.early_share[:, 1, 1], penalty / task)
                assert (found.early_share > 1e-3).all()
                return
            optimizer.step()
            schedule.step()
    raise AssertionError


def test_nothing_is_seen_of_a_penalty_that_is_not_there():
    trials = [Trial(0.05, 1e-3)]
    found = train(load("digits"), TINY, METHODS["decay"], trials, (3, 4), test=True)
    assert found.early_share.eq(0.0).all()
    assert found.early_ratio.shape == (2, 1, 2)


def cell(setting, method, errors, *, early=(1.0, 0.0), first=None, edges=()):
    """A result, as JSON holds it."""
    asked = {
        "setting": {
            "data": "digits",
            "images": setting,
            "epochs": 1,
            "network": "plain",
            "depth": 2,
            "scale": 1.0,
            "optimizer": "sgd",
            "noise": 0.0,
            "imbalance": 1.0,
        },
        "method": {"name": method},
    }
    found = {
        "asked": asked,
        "name": f"{setting}--{method}",
        "test_error": errors,
        "nonfinite": 0,
        "ratio_before": [1.0] * len(errors),
        "ratio_after": [1.0] * len(errors),
        "edges": list(edges),
        "trials": [None] * (16 if first is None else 24),
        "early_ratio": [early[0]] * 2,
        "early_share": [early[1]] * 2,
        "seconds": 1.0,
    }
    if first is not None:
        found["first"] = {"test_error": first, "edges": ["largest rate"]}
    return found


def around(middle, wobble=0.1):
    """Twenty errors of this mean, of which each method's differ a little."""
    return [middle + wobble * math.sin(seed * (1 + middle)) + 0.5 * seed for seed in range(20)]


def of_setting(number, **means):
    return [cell(number, name, around(middle)) for name, middle in means.items()]


def matched(result, **means):
    """The result with matched controls of these means."""
    controls = {name: {"test_error": around(middle)} for name, middle in means.items()}
    return result | {"matched": controls}


def test_uniformity_gains_only_beyond_all_controls():
    gain = of_setting(1, decay=9.0, random=8.9, length=8.8, half_mhe_2=7.0, orthogonality=7.5)
    growth = of_setting(2, decay=9.0, random=7.0, length=7.0, half_mhe_2=7.0, orthogonality=8.0)
    half = of_setting(3, decay=9.0, random=8.0, length=6.0, half_mhe_2=7.0, orthogonality=8.0)
    cost = of_setting(4, decay=7.0, random=7.1, length=7.0, half_mhe_2=9.0, orthogonality=7.0)
    without = of_setting(5, decay=7.0, half_mhe_2=5.0)  # no controls there
    results = [*gain, *growth, *half, *cost, *without]
    found = beyond_controls(results)
    verdicts = {one.result["name"]: one.verdict for one in found}
    assert verdicts["1--half_mhe_2"] == verdicts["1--orthogonality"] == "gain"
    assert verdicts["2--half_mhe_2"] == verdicts["3--half_mhe_2"] == "null"
    assert verdicts["2--orthogonality"] == verdicts["3--orthogonality"] == "null"
    assert verdicts["4--half_mhe_2"] == "cost"
    assert "5--half_mhe_2" not in verdicts
    by_name = {one.result["name"]: one for one in found}
    assert math.isclose(by_name["3--half_mhe_2"].rest, 1.0, abs_tol=0.1)  # growth alone is best
    assert {one.result["name"] for one in clear_gains(found)} == {
        "1--half_mhe_2",
        "1--orthogonality",
    }
    one = by_name["1--half_mhe_2"]
    largest = max(one.changes[name].p for name in ("decay", "random", "length"))
    assert largest <= one.corrected <= len(found) * largest * (1 + 1e-9)

    four = [*gain, *growth, *half, *cost]
    for some in (four, results):  # where controls are not there yet, nothing counts
        table = control_tables.uniformity_table(some)
        assert "| half-space MHE, s = 2 | 4 | 3 | 1 | 1 | 1 |" in table
        assert five_lines(some) == five_lines(four)
    lines = five_lines(four).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("- **Clear gains of MHE or MGD in 1 settings** (1 after Holm's")
    assert (
        "1 of them (1 after correction) are from PyTorch's own initial scale: half-space"
        in lines[0]
    )
    assert lines[0].endswith(
        "Orthogonality is so beyond the other three in 1 (1 after correction)."
    )
    assert "half-space MHE gains in 3, is worse in 1, and fails on 0 seeds" in lines[1]
    assert "Noise of the same length gains over weight decay in 3 settings" in lines[2]
    assert "half-space MHE in 1 (higher than all in 1)" in lines[2]
    assert control_tables.clear_gains_table([*gain, *cost]).count("digits") == 2
    for text in (control_tables.clear_gains_table(growth), five_lines([*growth, *cost])):
        assert "**In no setting**" in text
    by_setting = control_tables.controls_by_setting([*gain, *growth])
    first, second = by_setting.splitlines()[2:]
    assert first.endswith("| half-space MHE, s = 2, orthogonality |")
    assert second.endswith("|  |")


def test_what_is_clear_before_correction_and_not_after_it_is_told_apart():
    noisy = [8.7 + 0.9 * math.sin(seed * seed) + 0.5 * seed for seed in range(20)]
    results = [*of_setting(1, random=9.0, length=9.0, orthogonality=9.0)]
    results.append(cell(1, "decay", [9.0 + 0.5 * seed for seed in range(20)]))
    results.append(cell(1, "half_mhe_2", noisy))
    for number in range(2, 20):  # what makes the correction strict
        results += of_setting(number, decay=9.0, random=9.0, length=9.0, half_mhe_2=9.0)
    (one,) = clear_gains(beyond_controls(results))
    assert one.method == "half_mhe_2"
    assert one.verdict == "null"
    assert "in 1 settings** (0 after Holm's correction)" in five_lines(results)
    assert "1 of them (0 after correction) are from PyTorch's own" in five_lines(results)
    assert control_tables.clear_gains_table(results).splitlines()[2].endswith("| null |")


def test_what_spreads_without_growth_is_judged_by_the_same_rule():
    results = []
    for number in range(1, 5):
        results += of_setting(number, decay=9.0, random=8.0, length=8.0, half_mhe_2=7.0)
        results += of_setting(number, direction=10.0, decoupled=7.0)
    table = control_tables.uniformity_table(results)
    assert "| MHE's direction alone | 4 | 0 | 4 | 0 | 4 |" in table
    assert "| half-space MHE, s = 2, decoupled | 4 | 4 | 0 | 4 | 0 |" in table
    assert "MHE's turns without growth in 0 (decoupled: 4)" in five_lines(results)


def test_the_picture_shows_mhe_above_the_line_where_it_gains_beyond_a_control():
    """A dot's place is what a control gains, if anything, and what half-space MHE gains."""
    results = of_setting(1, decay=9.0, random=8.0, length=10.0, half_mhe_2=7.0)
    results += of_setting(2, decay=9.0, random=6.0, length=9.0, half_mhe_2=8.0)
    errors = {}
    for one in results:
        number, _, name = one["name"].partition("--")
        errors[name, number] = mean(one["test_error"])
    panels = controls_figure(results).axes
    for axes, control in zip(panels, ("random", "length"), strict=True):
        first, *others = axes.containers  # all settings are at PyTorch's own scale
        assert all(len(one.lines[0].get_xdata()) == 0 for one in others)
        drawn = first.lines[0].get_xydata()
        for (x, y), number in zip(drawn, "12", strict=True):
            decay = errors["decay", number]
            assert math.isclose(x, decay - min(decay, errors[control, number]), abs_tol=1e-9)
            assert math.isclose(y, decay - errors["half_mhe_2", number], abs_tol=1e-9)


def test_kinds_of_settings_are_told_apart():
    results = []
    for number, scale, half in ((1, 1.0, 7.0), (2, 1.0, 9.0), (3, 0.1, 7.0)):
        own = of_setting(number, decay=9.0, random=9.0, length=9.0, half_mhe_2=half)
        for one in own:
            one["asked"]["setting"]["scale"] = scale
        results += own
    untrained = of_setting(4, decay=89.0, random=89.0, length=89.0, half_mhe_2=7.0)
    table = control_tables.controls_by_condition([*results, *untrained])
    assert "| weight decay alone trains | 3 | 2, -2.0" in table
    assert "| PyTorch's initial scale | 2 | 1, -1.0" in table
    assert "| initial scale 0.1 | 1 | 1, -2.0" in table
    assert "AdamW" not in table
    where = five_lines([*results, *untrained]).splitlines()[3]
    assert "small initial weights (0.03 and 0.1) 1 of 1 (-2.0" in where
    assert "PyTorch's own 1 of 2 (-1.0" in where


def test_what_logs_tell_early_is_said_either_way():
    said = []
    moves = [
        lambda number: number,
        lambda number: -number,
        lambda number: number + 5.0 * math.sin(number * number),
        lambda number: 3.0 * math.sin(number * number),
    ]
    for move in moves:
        results = []
        for number in range(1, 13):
            gain = move(number)
            seen = (1.0 + 0.1 * number, 0.5)
            results += of_setting(number, decay=30.0, random=30.0, length=30.0)
            for name in ("half_mhe_2", "mgd", "orthogonality"):
                results.append(cell(number, name, around(30.0 - gain), early=seen))
        said.append(five_lines(results).splitlines()[4].partition("**: ")[0])
    assert said == [
        "- **What you see early tells much",
        "- **What you see early tells much, the other way round",
        "- **What you see early tells something",
        "- **What you see early does not tell whether it will help",
    ]


def test_matched_controls_are_those_of_the_penalty_itself():
    results = []
    for number in range(1, 5):
        results += of_setting(number, decay=9.0, random=9.0, length=9.0)
        results.append(matched(cell(number, "half_mhe_2", around(7.0)), random=8.0, length=8.5))
        results.append(matched(cell(number, "mgd", around(7.0)), random=7.0, length=6.0))
        worse = cell(number, "orthogonality", around(9.5))  # than weight decay alone
        results.append(matched(worse, random=12.0, length=12.0))
    found = beyond_controls(results)
    assert {one.matched_verdict for one in found if one.method == "half_mhe_2"} == {"gain"}
    for name in ("mgd", "orthogonality"):
        assert {one.matched_verdict for one in found if one.method == name} == {"null"}
    assert {one.verdict for one in found if one.method != "orthogonality"} == {"gain"}
    assert "with nothing tuned for these, in 4, 0, 0 (" in five_lines(results)
    table = control_tables.matched_table(results).splitlines()
    assert table[2] == "| half-space MHE, s = 2 | 4 | 4 | 0 | -1.00 | 4 | 0 | -1.49 | 4 | 0 |"
    assert table[3] == "| MGD | 4 | 0 | 0 | +0.00 | 0 | 4 | +1.00 | 0 | 0 |"
    own = METHODS["mgd"]
    assert replace(METHODS["mgd"], keep="length") == controls_of(own)["length"]
    assert controls_of(own)["random"].measure == RandomDirection(own.measure)
    for name in ("decay", "share", "loss", *CONTROLS):
        assert controls_of(METHODS[name]) == {}


def test_seeds_that_fail_are_counted():
    decay = cell(1, "decay", [10.0, 12.0, 11.0])
    bad = cell(1, "half_mhe_2", [9.0, 90.0, 24.5])
    assert failing(bad, decay) == 2
    assert failing(bad | {"nonfinite": 3}, decay) == 3
    hard = cell(1, "decay", [60.0, 62.0, 61.0])  # twice as much cannot be
    assert failing(cell(1, "half_mhe_2", [59.0, 85.0, 84.0]), hard) == 1
    untrained = cell(1, "decay", [90.0, 62.0, 61.0])
    assert failing(cell(1, "half_mhe_2", [59.0, 90.0, 84.0]), untrained) == 0
    (one,) = compare([decay, bad])
    assert one.failed
    assert "2 fail" in change_cell(one)
    assert control_tables.failing_seeds([one], "half_mhe_2") == 2


def test_wider_grids_and_changed_verdicts_are_counted():
    results = [
        cell(1, "decay", around(7.0), first=around(9.0)),
        cell(1, "half_mhe_2", around(7.0)),
        cell(2, "decay", around(9.0)),
        cell(2, "half_mhe_2", around(7.0), first=around(9.0), edges=["largest strength"]),
    ]
    before = before_widening(results)
    assert [one["test_error"] for one in before[:2]] == [around(9.0), around(7.0)]
    told = control_tables.widening_table(results)
    assert (
        "| half-space MHE, s = 2 | 2 | 1 | 1 | 20 | 24 | 1 | 2: 1 gain → null, 1 null → gain |"
        in told
    )
    assert "| weight decay only | 2 | 1 | 0 | 20 | 24 | 1 | 0 |" in told


def test_what_is_seen_early_is_correlated_with_the_gain_beyond_a_rival():
    results = []
    for number in range(1, 9):
        seen = (1.0 + 0.1 * number, 0.5)
        results += [
            cell(number, "decay", around(10.0), early=(1.0 + 0.3 * (number % 3), 0.0)),
            cell(number, "random", around(10.0 + number)),
            cell(number, "half_mhe_2", around(10.0 - number), early=seen),
            cell(number, "mgd", around(10.0 - 0.5 * number), early=seen),
            cell(number, "orthogonality", around(10.0 - 0.5 * number), early=seen),
        ]
    for x in ("product", "ratio"):
        found = early_and_gain(results, x)
        assert found.count == 24
        assert found.low > 0.5
    assert early_and_gain(results, "without").low < 0.0
    assert early_and_gain(results, rival="random").rho > 0.5
    table = control_tables.early_table(results)
    assert table.splitlines()[2].startswith(
        "| (ratio − 1) × gradient share | weight decay only | 24 |"
    )


def test_nothing_is_gained_over_a_rival_that_makes_no_error():
    results = []
    for number in range(1, 4):
        own = {"early": (1.0 + 0.1 * number, 0.5)}
        for name in ("decay", "random", "half_mhe_2", "mgd", "orthogonality"):
            error = 0.0 if number == 3 else 10.0 + number
            results.append(cell(number, name, [error] * 20, **own))
    assert early_and_gain(results).count == 6
    assert early_and_gain(results, rival="random").count == 6


def test_clusters_are_resampled_whole():
    chance = torch.Generator().manual_seed(0)
    single = [[(float(a), float(b))] for a, b in torch.randn(30, 2, generator=chance)]
    copied = [one * 3 for one in single]  # three times the same says no more
    one, three = clustered_rank_correlation(single), clustered_rank_correlation(copied)
    x, y = zip(*[pair for cluster in single for pair in cluster], strict=True)
    assert math.isclose(one.rho, float(stats.spearmanr(x, y).statistic), abs_tol=1e-9)
    assert math.isclose(one.rho, three.rho, abs_tol=1e-9)
    assert math.isclose(one.low, three.low, abs_tol=0.05)
    assert math.isclose(one.high, three.high, abs_tol=0.05)
