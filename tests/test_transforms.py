"""Measures under ``torch.func``: grad, vmap and jacrev of every member equal plain autograd, neurons by neurons."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

from lightning_hsu.measures import GaussianPotential, RieszEnergy, Sampled
from lightning_hsu.presets import OfficialMGD, OfficialMHE, OfficialMHS, OfficialRMHP
from tests.members import FAMILY, name_of

MEMBERS = [*FAMILY, Sampled(RieszEnergy(s=1), block=4), Sampled(GaussianPotential(), block=4)]
OFFICIAL = [
    OfficialMHE("a1"),
    OfficialMHE("2", half_space=False),
    OfficialMHS(),
    OfficialMGD(),
    OfficialRMHP(),
]
every_member = pytest.mark.parametrize("measure", MEMBERS, ids=name_of)
official_too = pytest.mark.parametrize("measure", [*MEMBERS, *OFFICIAL], ids=name_of)


def layers(*batch, kind="plain"):
    x = torch.randn(*batch, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if kind == "a zero row":
        x[..., 1, :] = 0.0
    if kind == "duplicates":
        x[..., 1, :] = x[..., 0, :]
    return x


def plain_grad(measure, x, state=None):
    leaf = x.clone().requires_grad_()
    value = measure.penalty(leaf, state)
    return torch.autograd.grad(value.sum(), leaf)[0] if value.requires_grad else torch.zeros_like(x)


def plain_product(measure, x, v, state=None):
    """The second derivative times v, by autograd."""
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(measure.penalty(leaf, state).sum(), leaf, create_graph=True)
    return torch.autograd.grad(first, leaf, v)[0]


def product(measure, x, v):
    """The same by transforms."""
    return grad(lambda y: (grad(measure.penalty)(y) * v).sum())(x)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@official_too
@pytest.mark.parametrize("kind", ["plain", "a zero row", "duplicates"])
def test_grad_and_vmap(measure, kind):
    xs = layers(3, kind=kind)
    close(grad(measure.penalty)(xs[0]), plain_grad(measure, xs[0]))
    close(vmap(measure.penalty)(xs), torch.stack([measure.penalty(x) for x in xs]))
    close(vmap(measure)(xs), torch.stack([measure(x) for x in xs]))
    each = torch.stack([plain_grad(measure, x) for x in xs])
    close(vmap(grad(measure.penalty))(xs), each)
    close(grad(lambda y: vmap(measure.penalty)(y).sum())(xs), each)


@every_member
def test_vmap_over_any_dimension_twice_and_over_groups(measure):
    xs = layers(3, 2)
    each = torch.stack([torch.stack([measure.penalty(x) for x in pair]) for pair in xs])
    close(vmap(vmap(measure.penalty))(xs), each)
    close(vmap(measure.penalty, in_dims=1)(xs.movedim(0, 1)), measure.penalty(xs))
    close(vmap(measure.penalty, in_dims=2)(xs[0].movedim(0, 2)), each[0])


@every_member
def test_half_and_single_precision(measure):
    xs = layers(3, 2)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        low = xs.to(dtype)
        found = vmap(grad(lambda x: measure.penalty(x).sum()))(low)
        exact = torch.stack([plain_grad(measure, x) for x in low])
        assert found.dtype == dtype
        assert float((found - exact).norm()) <= bound * float(exact.norm())


@every_member
def test_a_state_is_mapped_along(measure):
    xs = layers(3, 2)
    states = [measure.prepare(x, measure.prepare(x)) for x in xs]  # the second draw
    if states[0] is None:
        states = [{} for _ in xs]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    each = torch.stack(
        [measure.penalty(x, state or None) for x, state in zip(xs, states, strict=True)]
    )
    close(vmap(lambda x, state: measure.penalty(x, state or None))(xs, stacked), each)
    close(
        vmap(grad(lambda x, state: measure.penalty(x, state or None).sum()))(xs, stacked),
        torch.stack(
            [plain_grad(measure, x, state or None) for x, state in zip(xs, states, strict=True)]
        ),
    )
    one = vmap(lambda x: measure.penalty(x, states[0] or None))(xs)  # one state for all
    close(one, torch.stack([measure.penalty(x, states[0] or None) for x in xs]))


@official_too
def test_jacrev(measure):
    xs = layers(2)
    close(jacrev(measure.penalty)(xs[0]), plain_grad(measure, xs[0]))
    jacobian = jacrev(measure.penalty)(xs)
    gradient = plain_grad(measure, xs)
    for i in range(2):
        close(jacobian[i, i], gradient[i])
        assert not jacobian[i, 1 - i].any()


@official_too
def test_second_derivatives(measure):
    x, v = layers(2)
    exact = plain_product(measure, x, v)
    close(product(measure, x, v), exact)
    close(vmap(lambda y: product(measure, y, v))(x[None]), exact[None])
    close(vmap(lambda w: product(measure, x, w))(v[None]), exact[None])
    hessian = jacrev(grad(measure.penalty))(x)
    close((hessian * v).sum((-2, -1)), exact)
