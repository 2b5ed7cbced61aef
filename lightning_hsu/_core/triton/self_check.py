"""A small layer that the compiled kernels must compute right before they are used.

A compiler, a driver or a card may be at fault, and nobody would see it in a loss. So one layer with
a near pair and a zero row is computed on each device, for each kernel, and compared with
differences in float64. If a row is off, the compiled path is not taken any more.
"""

from __future__ import annotations

import warnings

import torch

from lightning_hsu._core.backend import VARIABLE
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.sphere import unit_rows
from lightning_hsu._core.trial import SHAPE, brief, gradient_error, trial_layer
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
        self._passed: set[object] = set()
        self._has_failed = False

    def gradients_are_right(self, device: torch.device, term: PairTerm) -> bool:
        """Whether a device computes the gradients of this kernel right; checked at first use."""
        if self._has_failed:
            return False
        how = precision()
        key = (device, term, how)
        if key in self._passed:
            return True
        space = "half space" if term.half_space else "full space"
        what = f"gradient (kernel {term.formula}, {space})"
        try:
            error = _gradient_error(device, term)
        except Exception as problem:
            return self._fail(device, f"raised {brief(problem)} over the {what}")
        if not error <= TOLERANCES[how]:
            return self._fail(device, f"computed a {what} off by {error:.1g} of its pairs' pulls")
        self._passed.add(key)
        return True

    def neighbours_are_right(self, device: torch.device) -> bool:
        """Whether a device finds the nearest neighbours; checked at first use."""
        if self._has_failed:
            return False
        if device in self._passed:
            return True
        try:
            error = _cosine_error(device)
        except Exception as problem:
            return self._fail(device, f"raised {brief(problem)} over the nearest neurons")
        if not error <= COSINES:
            return self._fail(device, f"found nearest neurons whose cosines are off by {error:.1g}")
        self._passed.add(device)
        return True

    def _fail(self, device: torch.device, what: str) -> bool:
        self._has_failed = True
        warnings.warn(
            f"{VARIABLE} is 'triton', but on {device} its kernels {what}, for a trial layer of shape "
            f"{SHAPE}. Plain torch computes from now on until this process ends. Unset {VARIABLE} "
            "to do without the trial, and please report it with the versions of torch and Triton",
            stacklevel=2,
        )
        return False


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
