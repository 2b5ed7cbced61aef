"""A small layer that the compiled kernels must compute right before they are used.

A compiler, a driver or a card may be at fault, and nobody would see it in a loss. So one layer with
a near pair and a zero row is computed on each device, for each kernel, and compared with
differences in float64. If a row is off, the compiled path is not taken any more.
"""

from __future__ import annotations

import torch

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.sphere import unit_rows
from lightning_hsu._core.trial import (
    Trial,
    gradient_error,
    gradient_fault,
    trial_layer,
)
from lightning_hsu._core.triton.machine import precision
from lightning_hsu._core.updates import GradientUpdate

TOLERANCES = {"ieee": 2e-5, "tf32x3": 2e-5, "tf32": 2e-2}
"""How far off a row's gradient may be, over the summed lengths of what its pairs add to it.

By the precision of the products. Measured in the interpreter over all kernels: at most 1e-6.
"""

COSINES = 1e-5
"""How far off the largest cosine of a neuron may be. Measured: 6e-8."""


class SelfCheck:
    """What has been checked in this process, and whether all of it was right."""

    def __init__(self) -> None:
        advice = "Please report it with the versions of torch and Triton"
        self._trial = Trial("triton", "its kernels", advice)

    def gradients_are_right(self, device: torch.device, term: PairTerm) -> bool:
        """Whether a device computes the gradients of this kernel right; checked at first use."""
        how = precision()

        def find_fault() -> str | None:
            return gradient_fault(_gradient_error(device, term), TOLERANCES[how], term)

        return self._trial.passes(device, (device, term, how), term, find_fault)

    def neighbours_are_right(self, device: torch.device) -> bool:
        """Whether a device finds the nearest neighbours; checked at first use."""

        def find_fault() -> str | None:
            error = _cosine_error(device)
            if error <= COSINES:
                return None
            return f"found nearest neurons whose cosines are off by {error:.1g}"

        return self._trial.passes(device, device, None, find_fault)


def _gradient_error(device: torch.device, term: PairTerm) -> float:
    """The largest error of a row's gradient, over the summed lengths of its pairs' parts."""
    from lightning_hsu._core.triton import launch

    with torch.inference_mode(False), torch.no_grad():
        w = trial_layer()
        there = w.to(device)
        out = torch.zeros_like(there)
        launch.add_pair_gradients([GradientUpdate(there, out, 1.0)], term)
        return gradient_error(out, w, term)


def _cosine_error(device: torch.device) -> float:
    """The largest error of the largest two cosines of a neuron, and of the cosine at its place."""
    from lightning_hsu._core.triton import topk

    with torch.inference_mode(False), torch.no_grad():
        x = unit_rows(trial_layer())[0]
        alive = x.ne(0).any(-1)
        found = topk.scan(x.to(device), alive.to(device), half_space=True, every=True)
        first, place, second = (part.cpu() for part in found)
        cosine = (x.double() @ x.double().mT).abs()
        cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        cosine.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), -torch.inf)
        expected = cosine.topk(2, dim=-1).values[alive]
        there = cosine.gather(-1, place.long()[..., None])[..., 0][alive]
        known = torch.stack([first[alive], second[alive], there], dim=-1).double()
        return float((known - expected[:, [0, 1, 0]]).abs().max())
