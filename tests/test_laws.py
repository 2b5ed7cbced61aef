"""The laws of the family: what every member obeys, in float32 and float64, whatever the shape and the scale."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_hsu import measures as public
from lightning_hsu import projections
from lightning_hsu._core import smallest_angle
from lightning_hsu.measures import Orthogonality, Polarization, ResultantLength
from lightning_hsu.projections import Adversarial, Projected
from lightning_hsu.reference import lower_bound, random_level, uniformity_ratio, uniformity_score
from tests import configurations as c
from tests.members import FAMILY, FRAMED, SEARCHING, InverseFourth, name_of


def members_where(applies):
    """Parametrize over the members of which a law speaks."""
    chosen = [measure for measure in FAMILY if applies(measure)]
    return pytest.mark.parametrize("measure", chosen, ids=name_of)


every_member = pytest.mark.parametrize("measure", FAMILY, ids=name_of)
EXAMPLES = 10  # for each member, so hundreds for each law
PRECISION = {torch.float64: 1e-8, torch.float32: 2e-4}

layers = st.fixed_dictionaries(
    {
        "n": st.integers(2, 9),
        "d": st.integers(2, 8),
        "scale": st.floats(-12, 12),
        "seed": st.integers(0, 10**6),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
    }
)


def drawn(layer, *batch):
    generator = torch.Generator().manual_seed(layer["seed"])
    x = torch.randn(*batch, layer["n"], layer["d"], generator=generator, dtype=torch.float64)
    return (10.0 ** layer["scale"] * x).to(layer["dtype"])


def same(a, b, layer, scale=None):
    """Equal up to the precision of the layer, relative to the larger of the two and one typical pull."""
    size = float(b.abs().max()) + (1.0 if scale is None else scale)
    assert float((a - b).abs().max()) <= PRECISION[layer["dtype"]] * size


def searches(measure):
    return isinstance(measure, SEARCHING) or (
        isinstance(measure, Projected) and isinstance(measure.measure, SEARCHING)
    )


def found_again(measure, x, other):
    """The same inner problem in another guise: the value is found again where it is exact, about the same where it is not."""
    states = [measure.prepare(one) for one in (x, other)]
    values = [float(measure(one, state)) for one, state in zip((x, other), states, strict=True)]
    exact = all(measure.is_exact(state) for state in states)
    assert values[0] == pytest.approx(values[1], rel=2e-5 if exact else 0.05)


def order_of(layer):
    """A random order of its neurons."""
    return torch.randperm(layer["n"], generator=torch.Generator().manual_seed(layer["seed"]))


def rotation_of(d):
    return torch.linalg.qr(
        torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    ).Q


def test_no_member_is_missing():
    members = {
        name
        for name in public.__all__
        if name not in ("Measure", "NearestMeasure", "PairwiseMeasure", "SphereMeasure", "State")
    }
    assert members == {type(measure).__name__ for measure in FAMILY} - {
        "InverseFourth",
        "Projected",
    }


@members_where(lambda measure: not searches(measure))
@settings(deadline=None, max_examples=EXAMPLES)
@given(layer=layers)
def test_order_does_not_matter(measure, layer):
    x = drawn(layer)
    order = order_of(layer)
    state = measure.prepare(x)
    value, grad = measure.value_and_grad(x, state)
    again, its = measure.value_and_grad(x[order], state)
    same(again, value, layer)
    same(its * 10 ** layer["scale"], grad[order] * 10 ** layer["scale"], layer)


@members_where(lambda measure: not searches(measure) and not isinstance(measure, FRAMED))
@settings(deadline=None, max_examples=EXAMPLES)
@given(layer=layers)
def test_a_common_rotation_does_not_matter(measure, layer):
    x = drawn(layer)
    # Its own rounding in float32 turns a row away from one that is near by a part of their distance.
    assume(layer["dtype"] == torch.float64 or smallest_angle(x, half_space=True) > 0.02)
    turn = rotation_of(layer["d"]).to(x)
    value, grad = measure.value_and_grad(x)
    again, its = measure.value_and_grad(x @ turn)
    same(again, value, layer)
    same(its @ turn.mT * 10 ** layer["scale"], grad * 10 ** layer["scale"], layer)


@members_where(searches)
@settings(deadline=None, max_examples=EXAMPLES)
@given(layer=layers)
def test_a_search_finds_the_same_in_any_order(measure, layer):
    x = drawn(layer)
    found_again(measure, x, x[order_of(layer)])


@members_where(lambda measure: isinstance(measure, SEARCHING))
@settings(deadline=None, max_examples=EXAMPLES)
@given(layer=layers)
def test_a_search_finds_the_same_after_a_rotation(measure, layer):
    x = drawn(layer)
    found_again(measure, x, x @ rotation_of(layer["d"]).to(x))


@every_member
@settings(deadline=None, max_examples=EXAMPLES)
@given(layer=layers, powers=st.lists(st.integers(-20, 20), min_size=9, max_size=9))
def test_norms_do_not_matter_and_gradients_go_with_their_inverse(measure, layer, powers):
    x = drawn(layer | {"scale": 0.0})
    factor = torch.tensor([2.0**k for k in powers], dtype=x.dtype)[: layer["n"], None]
    state = measure.prepare(x)
    value, grad = measure.value_and_grad(x, state)
    again, its = measure.value_and_grad(factor * x, state)
    same(again, value, layer)
    same(its * factor, grad, layer)


@every_member
@settings(deadline=None, max_examples=EXAMPLES)
@given(layer=layers)
def test_a_batch_equals_a_loop(measure, layer):
    x = drawn(layer, 2, 2)
    state = measure.prepare(x)
    value, grad = measure.value_and_grad(x, state)
    assert value.shape == (2, 2)
    for i in range(4):
        own = None if state is None else {name: part[i : i + 1] for name, part in state.items()}
        one, its = measure.value_and_grad(x[i // 2, i % 2], own)
        same(value[i // 2, i % 2], one, layer)
        same(grad[i // 2, i % 2] * 10 ** layer["scale"], its * 10 ** layer["scale"], layer)


@every_member
@settings(deadline=None, max_examples=EXAMPLES)
@given(layer=layers)
def test_the_gradient_is_tangent_and_that_of_the_penalty(measure, layer):
    x = drawn(layer)
    state = measure.prepare(x)
    value, grad = measure.value_and_grad(x, state)
    assert grad.shape == x.shape
    assert grad.dtype == x.dtype
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    across = (grad.double() * unit).sum(-1).abs().max()
    assert float(across) <= PRECISION[x.dtype] * (
        float(grad.double().norm()) + 10.0 ** -layer["scale"]
    )
    leaf = x.clone().requires_grad_()
    penalty = measure.penalty(leaf, state)
    penalty.backward()
    torch.testing.assert_close(penalty.detach(), value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(leaf.grad, grad, rtol=1e-5, atol=1e-7 * 10 ** -layer["scale"])
    same(measure(x, state), measure.natural(value), layer)


@every_member
@pytest.mark.parametrize(("shape", "fast"), [((5, 4), False), ((2, 4, 6), True), ((2, 7, 3), True)])
def test_gradcheck_and_gradgradcheck(measure, shape, fast):
    """Every derivative of one shape; of the others along random directions."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    state = measure.prepare(x)

    def penalty(y):
        return measure.penalty(y, state)

    assert torch.autograd.gradcheck(penalty, (x,), atol=1e-5, fast_mode=fast)
    assert torch.autograd.gradgradcheck(penalty, (x,), atol=1e-4, fast_mode=fast)


def simplices():
    """Members and the simplices at which they are stationary.

    Where a frame is drawn, a simplex is stationary in the mean over frames only; so it is for
    polarization in the mean over the lonely points, which n <= d neurons have on two sides.
    """
    for measure in FAMILY:
        if isinstance(measure, FRAMED):
            continue
        for n, d in ((3, 2), (4, 3), (6, 5), (4, 7)):
            if n > d or not isinstance(measure, Polarization):
                yield pytest.param(measure, n, d, id=f"{name_of(measure)}-{n}-{d}")


@pytest.mark.parametrize(("measure", "n", "d"), list(simplices()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_regular_simplex_is_stationary(measure, n, d, dtype):
    if isinstance(measure, SEARCHING):
        measure = replace(measure, witnesses=300)  # enough to know all lonely points
    x = c.simplex(n, d).to(dtype)
    grad = measure.value_and_grad(x)[1]
    assert float(grad.abs().max()) < {torch.float64: 1e-7, torch.float32: 1e-4}[dtype]


@every_member
def test_half_precision_is_measured_in_float32(measure):
    x = torch.randn(6, 5)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        state = measure.prepare(low)
        value, grad = measure.value_and_grad(low, state)
        wide, its = measure.value_and_grad(low.float(), state)
        assert value.dtype == torch.float32
        assert grad.dtype == dtype
        torch.testing.assert_close(value, wide, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.float(), its, rtol=2e-2, atol=1e-3)


@every_member
def test_zero_and_broken_rows_take_no_part(measure):
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    broken = torch.zeros(2, 8, 5, dtype=torch.float64)
    broken[0, :6], broken[1, [0, 2, 3, 4, 6, 7]] = x
    broken[1, 1] = float("nan")
    state = measure.prepare(x)
    value, grad = measure.value_and_grad(x, state)
    again, its = measure.value_and_grad(
        broken, state if state and measure.fits(broken, state) else None
    )
    torch.testing.assert_close(again, value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(its[0, :6], grad[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(its[1, [0, 2, 3, 4, 6, 7]], grad[1], rtol=1e-7, atol=1e-9)
    assert not its[0, 6:].any()
    assert not its[1, [1, 5]].any()
    assert torch.isfinite(measure.value_and_grad(broken)[0]).all()  # prepared with the broken rows


@every_member
@pytest.mark.parametrize(("n", "d"), [(2, 64), (2, 2), (40, 3), (64, 512)])
def test_float32_agrees_with_float64_on_layers_of_all_kinds(measure, n, d):
    x = torch.randn(n, d)
    if n == 2:
        x[1] = -x[0] + 0.1 * x[1]
    state = measure.prepare(x.double())
    value, grad = measure.value_and_grad(x, state)
    wide, its = measure.value_and_grad(x.double(), state)
    assert float(value) == pytest.approx(float(wide), rel=1e-4, abs=1e-5)
    assert float((grad - its).norm()) <= 1e-3 * float(its.norm()) + 1e-7


@every_member
@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (2, 1, 4), (0, 3, 4), (5, 0), (2, 5, 0)])
def test_too_few_neurons_have_penalty_zero(measure, shape):
    x = torch.randn(shape)
    value, grad = measure.value_and_grad(x)
    assert value.shape == shape[:-2]
    assert not value.any()
    assert not grad.any()
    assert torch.equal(measure.penalty(x), value)
    assert torch.equal(measure.penalty(x, measure.prepare(x)), value)
    assert not measure.gradient_rows(x, torch.ones(shape[:-1], dtype=torch.bool)).any()
    lone = torch.zeros(3, 4)
    lone[1] = 1
    assert not measure.value_and_grad(lone)[1].any()


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_degenerate_neurons_give_finite_values_and_gradients(measure, dtype):
    for kind, make in DEGENERATE.items():
        x = torch.randn(8, 6)
        make(x)
        value, grad = measure.value_and_grad(x.to(dtype))
        assert torch.isfinite(value), kind
        assert torch.isfinite(grad).all(), kind


DEGENERATE = {
    "duplicates": lambda x: x[1:3].copy_(x[:1]),
    "near-duplicates": lambda x: x[1].copy_(x[0] + 1e-6 * x[2]),
    "antipodal": lambda x: x[1].copy_(-2 * x[0]),
    "zero rows": lambda x: x[:3].zero_(),
    "all zero": lambda x: x.zero_(),
    "all equal": lambda x: x.copy_(x[:1].clone().expand(8, 6)),
    "on one axis": lambda x: x.copy_(x[:1] * torch.tensor([[1.0], [-1.0]]).repeat(4, 1)),
    "axes": lambda x: x.copy_(torch.eye(8, 6)),
    "in a plane": lambda x: x[:, 2:].zero_(),
    "tiny": lambda x: x.mul_(1e-4),
    "large": lambda x: x.mul_(1e4),
}


def sees_pairs(measure):
    """Whether two equal neurons push each other.

    A measure for which they do not says so in its docstring and is named here.
    """
    if isinstance(measure, Orthogonality):
        return measure.kind == "mc"
    return not isinstance(measure, ResultantLength) and not searches(measure)


@members_where(sees_pairs)
def test_equal_neurons_part(measure):
    """A step along the gradient takes duplicates apart, the same way each time."""
    x = torch.randn(5, 8, dtype=torch.float64)
    x[1] = x[0]
    first, again = (measure.value_and_grad(x.clone())[1] for _ in range(2))
    assert torch.equal(first, again)
    assert float((first[0] - first[1]).norm()) > 1e-3 * float(first.norm())


@every_member
@settings(deadline=None, max_examples=10)
@given(layer=layers)
def test_a_small_step_down_the_gradient_lowers_the_penalty(measure, layer):
    x = drawn(layer | {"scale": 0.0, "dtype": torch.float64})
    state = measure.prepare(x)
    grad = measure.value_and_grad(x, state)[1]
    size = float(grad.norm())
    assume(size > 1e-6)
    step = 1e-6 * grad / size
    # From both sides, which leaves out the curvature: of two neurons 4e-5 apart it is 6 % of a step.
    decrease = (measure.penalty(x + step, state) - measure.penalty(x - step, state)) / 2
    assert float(decrease) == pytest.approx(1e-6 * size, rel=0.05, abs=1e-9)


@every_member
@settings(deadline=None, max_examples=EXAMPLES)
@given(layer=layers)
def test_no_neurons_beat_the_bound(measure, layer):
    """Random neurons, and the same after some steps of descent."""
    n, d = layer["n"], layer["d"]
    bound = lower_bound(measure, n, d)
    x = drawn(layer | {"scale": 0.0, "dtype": torch.float64})
    for _ in range(8):
        penalty, grad = measure.value_and_grad(x)
        value = float(measure.natural(penalty))
        beaten = value - bound if measure.higher_is_better else bound - value
        assert math.isnan(bound) or beaten <= 1e-6 * (1 + abs(bound))
        x = torch.nn.functional.normalize(x, dim=-1)
        x = x - 0.3 * grad / grad.norm().clamp_min(1e-9)


def sees_both_sides(measure):
    """Double-sided orthogonality also sees the columns, which crowded neurons may make even."""
    return isinstance(measure, Orthogonality) and measure.kind == "dso"


def has_a_reference(measure):
    """Whether random neurons have a level: those of a search that goes on from step to step have none."""
    return not isinstance(getattr(measure, "projection", None), Adversarial)


@members_where(has_a_reference)
def test_random_neurons_have_ratio_one_and_score_zero(measure):
    n, d = (8, 5) if searches(measure) else (12, 7)  # a search of more takes seconds
    x = torch.randn(60, n, d)
    level = random_level(measure, n, d)
    values = measure(x)
    if level.source == "simulated median":
        assert float(values.quantile(0.2)) < level < float(values.quantile(0.8))
    else:
        error = math.hypot(float(values.std()) / math.sqrt(60), level.standard_error)
        assert float(values.mean()) == pytest.approx(level, abs=4.5 * error)
    redundant = x[0] * 0.3 + torch.ones(d) * x[0, 0]
    assert float(uniformity_ratio(measure, redundant)) > 1 or sees_both_sides(measure)
    assert math.isnan(lower_bound(measure, n, d)) or float(uniformity_score(measure, redundant)) < 0


@every_member
def test_members_are_values(measure):
    assert pickle.loads(pickle.dumps(measure)) == measure == copy.deepcopy(measure)
    assert hash(copy.deepcopy(measure)) == hash(measure)
    assert len({measure, copy.deepcopy(measure)}) == 1
    assert not measure.for_head().half_space


@members_where(lambda measure: not isinstance(measure, InverseFourth))  # not a public name
def test_public_members_can_be_written_down(measure):
    names = vars(public) | vars(projections)
    assert eval(repr(measure), names) == measure
    assert type(measure)() == type(measure)()


@every_member
def test_bad_input_is_told(measure):
    with pytest.raises(TypeError, match=r"floating-point tensor.*cast with x.float"):
        measure(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(..., n, d\).*got shape \(3,\)"):
        measure(torch.ones(3))
