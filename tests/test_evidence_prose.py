"""What docs/evidence.md and the main README say in words of the committed results is what these give."""

from collections import Counter
from pathlib import Path
from statistics import mean, median

import pytest

from evidence.comparisons import compare
from evidence.control_tables import widening_table, with_controls
from evidence.files import read
from evidence.methods import PENALTIES
from evidence.tables import CONDITIONS, of_method
from evidence.uniformity import beyond_controls, clear_gains, early_and_gain
from tests.pages import in_one_line

ROOT = Path(__file__).parents[1]
TITLES = {"half_mhe_2": "half-space MHE", "mgd": "MGD", "orthogonality": "orthogonality"}
IN_WORDS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def results():
    return read(ROOT / "evidence/results/cells.json")


@pytest.fixture(scope="module")
def beyond(results):
    """Each penalty in every setting, by the penalty's name."""
    found = {name: [] for name in PENALTIES}
    for one in beyond_controls(results):
        found[one.method].append(one)
    return found


@pytest.fixture(scope="module")
def page():
    return in_one_line("docs/evidence.md")


@pytest.fixture(scope="module")
def readme():
    return in_one_line("README.md")


def listed(numbers):
    """Three numbers as the pages list them."""
    first, second, third = numbers
    return f"{first}, {second} and {third}"


def minus(value):
    return f"{value:+.2f}".replace("-", "−")


def test_what_noise_and_growth_gain_too(results, beyond, page):
    comparisons = with_controls(results)
    alone = set()
    for name in ("random", "length"):
        alone |= {one.setting for one in of_method(comparisons, name) if one.verdict == "gain"}
    gains, shared, stand, own, rest = {}, [], [], [], []
    for name in PENALTIES:
        found = of_method(comparisons, name)
        gains[name] = {one.setting for one in found if one.verdict == "gain"}
        shared.append(len(gains[name] & alone))
        stand.append(sum(one.verdict == "gain" for one in beyond[name]))
        beyond_own = {one.setting for one in beyond[name] if one.matched_verdict == "gain"}
        own.append(len(beyond_own & gains[name]))
        rest.append(median(one.rest for one in beyond[name]))
    assert (
        f"Of {listed([len(one) for one in gains.values()])} gains of half-space MHE, MGD and "
        f"orthogonality over weight decay one of the two gains as well in {listed(shared)}; "
        f"{listed(stand)} stand beyond both tuned controls, and {listed(own)} beyond their own"
    ) in page
    matched = sum(one.matched_verdict == "gain" for one in beyond["orthogonality"])
    assert f"orthogonality has {matched}, {IN_WORDS[matched - own[2]]} of them no gains" in page
    assert [value < 0 for value in rest] == [False, True, False]
    assert (
        f"the three are {rest[0]:.2f} above, {-rest[1]:.2f} below and {rest[2]:.2f} points above"
    ) in page


def test_where_penalties_stand_beyond_both_tuned_controls(beyond, page, readme):
    def stand(name, kind, scale=None):
        found = 0
        for one in beyond[name]:
            setting = one.result["asked"]["setting"]
            fits = scale is None or setting["scale"] == scale
            found += fits and CONDITIONS[kind](setting) and one.verdict == "gain"
        return found

    half, mgd, so = (stand(name, "AdamW") for name in PENALTIES)
    assert mgd == so
    assert half == stand("half_mhe_2", "20 % wrong labels")
    assert (
        f"beyond both tuned controls in {mgd} of 6 settings (half-space MHE {half}, as with wrong"
    ) in page
    adamw = [f"{stand(name, 'AdamW', 1.0)} ({TITLES[name]})" for name in PENALTIES]
    wrong = [stand(name, "20 % wrong labels", 1.0) for name in PENALTIES]
    assert (
        f"stood beyond both tuned controls in {listed(adamw)} of 3 settings with AdamW, and in "
        f"{listed(wrong)} of 3 with wrong labels; half-space MHE's and orthogonality's in one with "
        "four layers, too: few, none of them digits."
    ) in readme
    # These are all of them from PyTorch's own scale, and there are none of the kinds that are named.
    for name in PENALTIES:
        usual = [one for one in beyond[name] if one.result["asked"]["setting"]["scale"] == 1.0]
        standing = [one.setting for one in usual if one.verdict == "gain"]
        deep = [one for one in standing if "Fashion-MNIST, 4 x 64, n = 1000, 30 epochs" in one]
        assert len(deep) == (name != "mgd")
        told = stand(name, "AdamW", 1.0) + stand(name, "20 % wrong labels", 1.0)
        assert len(standing) == told + len(deep)
        assert not any("digits" in one for one in standing)
        for kind in ("convolutions", "convolutions with batch norm", "long training"):
            assert stand(name, kind) == stand(name, "long-tailed classes") == 0


def test_clear_gains_and_what_is_left_of_them(beyond, page):
    found = clear_gains([one for own in beyond.values() for one in own])
    own = [one for one in found if one.method != "orthogonality"]
    rivals = [one for one in found if one.method == "orthogonality"]

    def counted(some):
        usual = [one for one in some if one.result["asked"]["setting"]["scale"] == 1.0]
        left = [one for one in some if one.verdict == "gain"]
        return len(some), len(usual), len(left), sum(one in usual for one in left)

    all_, usual, left, usual_left = counted(own)
    assert f"is found in {IN_WORDS[all_]} settings" in page
    assert f"{IN_WORDS[usual].capitalize()} are at PyTorch's scale" in page
    assert (
        f"{IN_WORDS[left]} of the {IN_WORDS[all_]} are left, {IN_WORDS[usual_left]} at PyTorch's"
    ) in page
    all_, _, left, usual_left = counted(rivals)
    assert (
        f"in {all_} settings ({left} after correction, {IN_WORDS[usual_left]} of them at PyTorch's"
    ) in page


def test_losses_and_wider_grids(results, page):
    comparisons = with_controls(results)
    failed = []
    for name in PENALTIES:
        failed.append(sum(one.failed for one in of_method(comparisons, name)))
    assert (
        f"half-space MHE is worse by two standard errors, or fails, in {failed[0]} settings, MGD in "
        f"{failed[1]}, orthogonality in {failed[2]}."
    ) in page
    table = widening_table(results)
    changed = table.rpartition("against weight decay ")[2].split()[0]
    told = Counter()
    for line in table.splitlines():
        if any(
            line.startswith(f"| {title}") for title in ("half-space MHE, s = 2 |", "MGD", "orth")
        ):
            for part in line.rpartition(": ")[2].removesuffix(" |").split(", "):
                count, _, kind = part.partition(" ")
                told[kind] += int(count)
    assert told.total() == int(changed)
    assert (
        f"change {changed} of the 144 verdicts against weight decay, {told['null → gain']} of them"
    ) in page


def test_what_is_seen_early(results, page):
    product, share = early_and_gain(results), early_and_gain(results, "share")
    assert f"({minus(product.rho)}, interval {minus(product.low)} to {minus(product.high)})" in page
    noise = early_and_gain(results, rival="random")
    assert f"({minus(noise.rho)}, {minus(noise.low)} to {minus(noise.high)})" in page
    assert f"({minus(share.rho)}, {minus(share.low)} to {minus(share.high)})" in page


def test_gains_on_cifar10(readme):
    kept = ROOT / "evidence/results/images"
    told = []
    for name in (
        "resnet18-width8-steps900-rate0.2-decay0.002",
        "vit-bn-width32-steps700-rate0.008",
    ):
        errors = {}
        for run in read(kept / f"cifar10-{name}-n10000-seeds5to14.json"):
            errors.setdefault(run["method"], []).append(run["errors"][-1])
        gains = [mean(errors["none"]) - mean(errors[name]) for name in PENALTIES]
        told.append(listed([f"{gain:.1f}" for gain in gains]))
    resnet, vit = told
    assert f"without a penalty ({resnet} points) and with a ViT with batch norm ({vit})" in readme


def test_the_demos_setting_in_the_whole_plan(results, readme):
    setting = "MNIST1D, 4 x 64, n = 5000, 10 epochs, scale 1"
    found = {one.method: -one.paired.mean for one in compare(results) if one.setting == setting}
    assert (
        f"growth of the norms alone, tuned, gains {found['length']:.1f} points, half-space MHE "
        f"{found['half_mhe_2']:.1f} and MGD {found['mgd']:.1f}"
    ) in readme
