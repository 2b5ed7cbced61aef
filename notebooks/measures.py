# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Measures: what each of them wants
#
# Every measure of the library, on the circle and on the sphere: where descent on it takes the same random points, and
# what it says about
# them. At the end two classical optima, Thomson's and Tammes', beside their known values.

# %%
import math
import os
from itertools import combinations

import matplotlib.pyplot as plt
import torch
from measures_picture import PANELS

from lightning_hsu.measures import RieszEnergy, Separation
from lightning_hsu.reference import uniformity_ratio, uniformity_score

FAST = bool(os.environ.get("FAST"))
STEPS = 150 if FAST else 600
kinds = {panel.title.replace("\n", ""): panel.measure for panel in PANELS}


def descend(measure, x, steps=STEPS, rate=0.2):
    """Points (..., n, d) after some steps along the normalised gradient, each shorter than the last; the best of them."""
    state, best, least = None, x, torch.full(x.shape[:-2], math.inf, dtype=x.dtype)
    for step in range(steps):
        state = measure.prepare(x, state)
        value, grad = measure.value_and_grad(x, state)
        best = torch.where((value < least)[..., None, None], x, best)
        least = torch.minimum(value, least)
        length = grad.norm(dim=-1).amax(-1)[..., None, None].clamp_min(1e-12)
        x = torch.nn.functional.normalize(
            x - rate * (1 - step / steps) ** 2 * grad / length, dim=-1
        )
    return best


def smallest_angle(x):
    return float(Separation()(x).rad2deg())


# %% [markdown]
# ## The circle
#
# Seven points from the same random start. Measures that see pairs space them evenly; in half space x and -x count as one.
# `ResultantLength` only
# balances them, `Orthogonality` only spreads them over the axes: both are content with points on top of each other.

# %%
start = torch.nn.functional.normalize(
    torch.randn(7, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64), dim=1
)
circle = {name: descend(measure, start) for name, measure in kinds.items()}
figure, axes = plt.subplots(3, 5, figsize=(11, 7.4), layout="constrained")
angles = torch.linspace(0, 2 * math.pi, 200)
for ax, (name, x) in zip(axes.flat, {"random start": start, **circle}.items(), strict=True):
    ax.plot(angles.cos(), angles.sin(), color="#C9C9C9", lw=1)
    ax.scatter(*x.T, s=36, color="#0072B2" if name != "random start" else "#D55E00", zorder=3)
    ax.set_title(name, size=9)
    ax.set_aspect("equal")
    ax.set_axis_off()
plt.show()

# %%
print(f"{'7 points on the circle':42s} {'value':>10s} {'ratio':>7s} {'score':>7s} {'angle':>7s}")
for name, x in circle.items():
    measure = kinds[name]
    numbers = (
        float(measure(x)),
        float(uniformity_ratio(measure, x)),
        float(uniformity_score(measure, x)),
        smallest_angle(x),
    )
    print(f"{name:42s} {numbers[0]:10.4f} {numbers[1]:7.3f} {numbers[2]:7.3f} {numbers[3]:7.2f}")
assert abs(smallest_angle(circle["RieszEnergy(s=2)"]) - 360 / 7) < 0.5  # the regular heptagon
assert abs(smallest_angle(circle["KoLeo()"]) - 360 / 7) < 3

# %% [markdown]
# ## The sphere
#
# Twelve points. Lines join neighbours that are at most a tenth further apart than the nearest.

# %%
start = torch.nn.functional.normalize(
    torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1
)


def draw(ax, x, title):
    """Points of the sphere with the edges between nearest neighbours; those behind are pale."""
    chords = {
        pair: float((x[pair[0]] - x[pair[1]]).norm()) for pair in combinations(range(len(x)), 2)
    }
    shortest = min(chords.values())
    for (i, j), chord in chords.items():
        if chord < 1.1 * shortest:
            ax.plot(*zip(x[i].tolist(), x[j].tolist(), strict=True), color="#6B6B6B", lw=0.8)
    ax.scatter(*x.T, s=26, color="#0072B2", depthshade=True)
    ax.set_title(title, size=9)
    ax.set_box_aspect((1, 1, 1))
    ax.set_axis_off()


sphere = {name: descend(measure, start) for name, measure in kinds.items()}
figure, axes = plt.subplots(
    3, 5, figsize=(11, 7.4), layout="constrained", subplot_kw={"projection": "3d"}
)
for ax, (name, x) in zip(axes.flat, {"random start": start, **sphere}.items(), strict=True):
    draw(ax, x, name)
plt.show()

# %%
print(f"{'12 points on the sphere':42s} {'value':>10s} {'ratio':>7s} {'score':>7s} {'angle':>7s}")
for name, x in sphere.items():
    measure = kinds[name]
    numbers = (
        float(measure(x)),
        float(uniformity_ratio(measure, x)),
        float(uniformity_score(measure, x)),
        smallest_angle(x),
    )
    print(f"{name:42s} {numbers[0]:10.4f} {numbers[1]:7.3f} {numbers[2]:7.3f} {numbers[3]:7.2f}")

# %% [markdown]
# ## Two optima that are known
#
# Thomson's problem, the least sum of inverse distances, and Tammes', the largest smallest angle, have for twelve points
# the same
# solution: the icosahedron. For eight points Thomson's is not the cube but a square antiprism.

# %%
known = {
    4: (3.674234614, 109.4712206),
    6: (9.985281374, 90.0),
    8: (19.675287861, 74.8584922),
    12: (49.165253058, 63.4349488),
}
figure, axes = plt.subplots(
    2, 4, figsize=(10, 5.4), layout="constrained", subplot_kw={"projection": "3d"}
)
for column, (n, (thomson, tammes)) in enumerate(known.items()):
    starts = torch.randn(4, n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    charges = min(
        descend(RieszEnergy(s=1), starts, 2 * STEPS), key=lambda x: float(RieszEnergy(s=1)(x))
    )
    apart = max(descend(Separation(), starts, 6 * STEPS, 0.3), key=smallest_angle)
    total = float(RieszEnergy(s=1)(charges)) * n * (n - 1) / 2
    print(
        f"n = {n:2d}   Thomson {total:.6f}, known {thomson:.6f}   Tammes {smallest_angle(apart):.3f}°, known {tammes:.3f}°"
    )
    assert abs(total - thomson) < 1e-6 * thomson
    assert smallest_angle(apart) > tammes - 0.1
    draw(axes[0, column], charges, f"Thomson, {n}: {total:.4f}")
    draw(axes[1, column], apart, f"Tammes, {n}: {smallest_angle(apart):.2f}°")
plt.show()
