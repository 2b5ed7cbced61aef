"""All pairs of neurons at once: histogram, near-duplicates, in bounded memory."""

import math

import pytest
import torch

from lightning_hsu._core import histogram as module
from lightning_hsu._core.histogram import pair_histogram


def brute(w, above, half_space):
    """Angles in degrees and near pairs, by float64 over all pairs."""
    live = (w.norm(dim=1) > 0).nonzero().flatten().tolist()
    x = torch.nn.functional.normalize(w.double(), dim=1)
    angles, near = [], set()
    for k, i in enumerate(live):
        for j in live[k + 1 :]:
            cosine = float(x[i] @ x[j])
            angles.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))
            if (abs(cosine) if half_space else cosine) >= above:
                near.add((i, j))
    return angles, near


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("entries", [100, 2**22])
def test_it_equals_a_loop_over_all_pairs(half_space, entries, monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", entries)  # a few rows at a time, and all at once
    w = torch.randn(61, 5, generator=torch.Generator().manual_seed(1))
    w[7] = 3.0 * w[5]
    w[40] = -0.1 * w[5]
    w[13] = 0.0
    w[14] = math.nan
    found = pair_histogram(w, above=0.9, half_space=half_space, keep=1000)
    angles, near = brute(torch.where(w.isnan(), 0.0, w), 0.9, half_space)
    assert found.similar == len(near) > 10
    assert {tuple(pair) for pair in found.pairs.tolist()} == near
    assert int(found.angles.sum()) == len(angles)
    counted = torch.histc(torch.tensor(angles), 90, 0.0, 180.0)
    assert (
        int((found.angles - counted).abs().sum()) <= 4
    )  # an angle on an edge may fall to either side
    assert (found.opposite > 0) == half_space
    nearest = (
        torch.minimum(found.pair_angles, 180.0 - found.pair_angles)
        if half_space
        else found.pair_angles
    )
    assert torch.equal(nearest, nearest.sort().values)


def test_only_the_nearest_are_kept_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", 50)
    w = torch.tensor([[1.0, 0.001 * i] for i in range(30)])
    found = pair_histogram(w, keep=7)
    assert found.similar == 30 * 29 // 2
    assert found.pairs.shape == (7, 2)
    assert set((found.pairs[:, 1] - found.pairs[:, 0]).tolist()) == {1}  # neighbours are nearest
    assert found.pair_angles[0] == pytest.approx(math.degrees(0.001), rel=0.01)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_neurons(n):
    found = pair_histogram(torch.eye(4)[:n])
    assert (found.similar, int(found.angles.sum()), len(found.pairs)) == (0, n * (n - 1) // 2, 0)


def test_tiny_angles_are_told_from_none():
    w = torch.tensor([[1.0, 0.0], [1.0, 1e-6], [1.0, 0.0]])
    found = pair_histogram(w)
    assert found.pairs[0].tolist() == [0, 2]
    assert found.pair_angles.tolist() == pytest.approx(
        [0.0, math.degrees(1e-6), math.degrees(1e-6)], rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    w = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert pair_histogram(w).angles.tolist() == pair_histogram(w.float()).angles.tolist()


def test_work_is_told_as_it_is_done(monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", 200)
    told = []
    pair_histogram(torch.randn(40, 3), done=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    assert len(told) > 3
