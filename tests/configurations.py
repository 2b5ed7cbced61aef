"""Point sets on the sphere whose energies are known in closed form, float64."""

import math
from itertools import product

import torch


def simplex(n, d):
    """n <= d + 1 points with all cosines -1 / (n - 1)."""
    centred = torch.eye(n, dtype=torch.float64) - 1.0 / n
    basis = torch.linalg.qr(centred.T[:, : n - 1]).Q  # (n, n - 1)
    return torch.nn.functional.pad(centred @ basis, (0, d - n + 1))


def orthonormal(n, d):
    return torch.eye(n, d, dtype=torch.float64)


def cross_polytope(d):
    return torch.cat([orthonormal(d, d), -orthonormal(d, d)])


def polygon(n):
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], 1)


def icosahedron():
    golden = (1 + math.sqrt(5)) / 2
    points = [(0.0, a, b * golden) for a, b in product((1, -1), repeat=2)]
    return torch.tensor([p[-i:] + p[:-i] for p in points for i in range(3)], dtype=torch.float64)


def rotated(x, seed=0):
    """The same points, rotated and stretched row by row: nothing may change."""
    generator = torch.Generator().manual_seed(seed)
    d = x.shape[-1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return (
        x @ rotation * (0.5 + torch.rand(x.shape[0], 1, generator=generator, dtype=torch.float64))
    )
