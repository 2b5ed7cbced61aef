"""A small layer that compiled code must compute right before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hsu._core.backend import VARIABLE
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.oracle import oracle_energy
from lightning_hsu._core.sphere import seeded, unit_rows

SHAPE = (48, 40)
"""Neurons and dimension of the layer: neither fills a tile."""

_NEAR_ROWS = (7, 31)
_ZERO_ROW = 12
_FITS = 1e30  # longer gradients, of the steepest kernels' near pairs, are shortened on purpose
_TINY = 1e-12


def trial_layer() -> Tensor:
    """Neurons (1, n, d) with a pair at a chord of 1e-2 and a zero row, the same everywhere."""
    w = torch.randn(1, *SHAPE, generator=seeded(), dtype=torch.float32, device="cpu")
    first, second = _NEAR_ROWS
    w[0, second] = 2.0 * w[0, first] + 2e-2 * w[0, second]
    w[0, _ZERO_ROW] = 0.0
    return w


def gradient_error(out: Tensor, w: Tensor, term: PairTerm) -> float:
    """The largest error of a row's gradient, over the summed lengths of its pairs' parts.

    Args:
        out: What has been computed for the neurons, (b, n, d), each group the same.
        w: The trial layer (1, n, d).
        term: The kernel.
    """
    expected, parts = _expected_gradient(w, term)
    length = torch.linalg.vector_norm(expected, dim=-1)
    error = torch.linalg.vector_norm(out.cpu().double() - expected, dim=-1)
    fits = (length < _FITS).expand_as(error)
    # The zero row's parts are 0: if it gets any gradient, that is off by far.
    return float((error / parts.clamp_min(_TINY))[fits].max())


def _expected_gradient(w: Tensor, term: PairTerm) -> tuple[Tensor, Tensor]:
    """The gradient by differences and autograd, in float64, and what its rounding goes by.

    Returns:
        The gradient (1, n, d), and for each row the summed lengths (1, n) of what the pairs add to
        it: these may cancel in the gradient, as in half space.
    """
    with torch.enable_grad():
        wide = w.double().requires_grad_()
        energy = oracle_energy(wide, term)
        if term.logarithm:
            energy = energy.log()
        (grad,) = torch.autograd.grad(energy.sum(), wide)
    x, inverse_norm = unit_rows(w.double())
    q = torch.cdist(x, x).square()
    p = 4.0 - q
    alive = inverse_norm > 0
    pairs = (alive & alive.mT).double()
    pairs.diagonal(dim1=1, dim2=2).zero_()
    _, slope, mirrored_slope = term.split(q, p)
    lengths = slope.abs() * q.sqrt() + mirrored_slope.abs() * p.clamp_min(0.0).sqrt()
    factor = 2.0 * term.scale(int(alive.sum()))
    if term.logarithm:
        factor = factor / float(oracle_energy(w, term))
    return grad, factor * (lengths * pairs).sum(-1) * inverse_norm[..., 0]


def brief(problem: Exception) -> str:
    """The kind of an error and the first line of what it says, without torch's words around it."""
    inner = getattr(problem, "inner_exception", None)
    if isinstance(inner, Exception):
        problem = inner
    text = str(problem).strip().partition("\n")[0]
    return f"{type(problem).__name__}: {text}"


def kernel_of(term: PairTerm) -> str:
    """A kernel, as a warning names it."""
    space = "half space" if term.half_space else "full space"
    return f"kernel {term.formula or term.kernel}, {space}"


class Trial:
    """What of a back end has been checked in this process, and whether all of it was right.

    Args:
        name: The back end.
        code: What of it computes, as the warning calls it.
        advice: The last sentence of the warning.
    """

    def __init__(self, name: str, code: str, advice: str) -> None:
        self._name = name
        self._code = code
        self._advice = advice
        self.passed: set[object] = set()
        self.has_failed = False

    def passes(
        self,
        device: torch.device,
        key: object,
        term: PairTerm | None,
        find_fault: Callable[[], str | None],
    ) -> bool:
        """Whether compiled code is right; checked at first use.

        Args:
            device: Where it computes.
            key: What the check is of.
            term: The kernel whose gradients are computed; None for nearest neurons.
            find_fault: Computes the trial layer, and says what is wrong; None if nothing is.
        """
        if self.has_failed:
            return False
        if key in self.passed:
            return True
        try:
            fault = find_fault()
        except Exception as problem:
            what = "nearest neurons" if term is None else f"gradient ({kernel_of(term)})"
            fault = f"raised {brief(problem)} over the {what}"
        if fault is None:
            self.passed.add(key)
            return True
        self.fail(device, f"{fault}, for a trial layer of shape {SHAPE}")
        return False

    def fail(self, device: torch.device, fault: str) -> None:
        """Take the back end no more, and say why."""
        self.has_failed = True
        warnings.warn(
            f"{VARIABLE} is '{self._name}', but on {device} {self._code} {fault}. Plain torch "
            f"computes from now on until this process ends. Unset {VARIABLE} to do without the "
            f"trial. {self._advice}",
            stacklevel=2,
        )


def gradient_fault(error: float, most: float, term: PairTerm) -> str | None:
    """What a warning says of the trial layer's gradient; None if it is right."""
    if error <= most:
        return None
    return f"computed a gradient ({kernel_of(term)}) off by {error:.1g} of its pairs' pulls"
