"""The back end "compiled": plain torch, with torch.compile between the products (``fused.py``).

It is taken only after it has computed a small layer as float64 does, on each device and for each
kernel. Where it has not, or torch cannot compile here, plain torch computes from then on. Compiling
takes seconds, at the first step and at the first one that logs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch

from lightning_hsu._core.batches import Batch, batches_of
from lightning_hsu._core.foreach import TorchBackend
from lightning_hsu._core.fused import Fused, FusedTerm
from lightning_hsu._core.group_numbers import GroupStats
from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.oracle import oracle_energy
from lightning_hsu._core.pairwise import too_steep
from lightning_hsu._core.precision import exact_arithmetic
from lightning_hsu._core.sphere import unit_rows
from lightning_hsu._core.trial import (
    Trial,
    brief,
    gradient_error,
    gradient_fault,
    kernel_of,
    trial_layer,
)
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._core.without_sync import (
    BatchGradient,
    BatchNumbers,
    add_batch,
    gradients_without_sync,
    numbers_without_sync,
)

TOLERANCE = 2e-5
"""How far off a row's gradient may be, over the summed lengths of what its pairs add to it.

Measured on a CPU: at most 2e-6, over kernels with s from -1 to 20 and both spaces.
"""

STATS = 1e-5
"""How far off a mean energy may be, relative to itself, and a largest cosine. Measured: 1e-6."""

_TINY = 1e-300

Found = TypeVar("Found")


class CompiledBackend(TorchBackend):
    """Takes all layers in one pass, on a CPU as well, and compiles what lies between the products."""

    name: ClassVar[str] = "compiled"
    compiles: ClassVar[bool] = True

    def __init__(self) -> None:
        self._terms: dict[PairTerm, FusedTerm] = {}
        self._trial = Trial(
            self.name,
            "the code that torch.compile makes",
            "On a CPU torch.compile needs a C++ compiler such as g++, on a GPU Triton and a C compiler",
        )

    def takes_on_cpu(self, update: GradientUpdate, term: PairTerm) -> bool:
        """Layers whose kernel has passed the check there."""
        w = update.entries
        if w.device.type != "cpu" or w.dtype == torch.float64 or update.size[1] < 2:
            return False
        return not too_steep(term) and self._is_right(w.device, term, with_sums=False)

    def gradients(self, batch: Batch, *, stats: bool = False) -> BatchGradient:
        """The gradients of a batch, compiled if all its kernels have passed the check."""
        with_sums = stats or any(term.logarithm for term in batch.terms)
        act = partial(gradients_without_sync, batch, stats=stats)
        return self._computed(act, batch, with_sums=with_sums)

    def numbers(self, batch: Batch) -> BatchNumbers:
        """What a logging step needs of a batch, alike."""
        return self._computed(partial(numbers_without_sync, batch), batch, with_sums=True)

    def _computed(self, act: Callable[..., Found], batch: Batch, *, with_sums: bool) -> Found:
        """What a pass over a batch finds, compiled or else step by step."""
        fused = self._fused(batch, with_sums=with_sums)
        if fused is not None:
            try:
                return act(fused=fused)
            except Exception as problem:
                self._trial.fail(batch.updates[0].entries.device, f"raised {brief(problem)}")
        return act()

    def _fused(self, batch: Batch, *, with_sums: bool) -> Fused | None:
        """What evaluates the kernels of a batch; None if torch is to be called step by step."""
        w = batch.updates[0].entries
        if w.dtype == torch.float64 or w.device.type not in ("cpu", "cuda"):
            return None
        for term in batch.terms:
            if not self._is_right(w.device, term, with_sums=with_sums):
                return None
        return Fused([self._terms[term] for term in batch.terms], with_sums=with_sums)

    def _is_right(self, device: torch.device, term: PairTerm, *, with_sums: bool) -> bool:
        """Whether a device computes this kernel right; compiled and checked at first use."""
        with_sums = with_sums or term.logarithm

        def find_fault() -> str | None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about its own code
                fused = self._terms.setdefault(term, FusedTerm(term, _compiled))
                error, error_of_stats = trial_errors(device, fused, with_sums=with_sums)
            fault = gradient_fault(error, TOLERANCE, term)
            if fault is None and not error_of_stats <= STATS:
                what = f"an energy or a largest cosine ({kernel_of(term)})"
                return f"computed {what} off by {error_of_stats:.1g}"
            return fault

        key = (device, term, with_sums)
        return self._trial.passes(device, key, term, find_fault)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for any sizes.

    Where torch does not compile, as in a mode that sees every operation or beyond its limit of
    versions, it runs the function as it is written.
    """
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


def trial_errors(device: torch.device, fused: FusedTerm, *, with_sums: bool) -> tuple[float, float]:
    """How far off the trial layer's gradient is, and its energy and largest cosine.

    Three groups of it are computed, so that no two sizes of what is compiled, or of the buffers that
    hold it, happen to be the same: torch would take them to be the same always.
    """
    term = fused.term
    with torch.inference_mode(False), torch.no_grad():
        w = trial_layer()
        there = w.to(device).expand(3, -1, -1).contiguous()
        out = torch.zeros_like(there)
        (batch,) = batches_of([(GradientUpdate(there, out, 1.0), term)])
        evaluate = Fused([fused], with_sums=with_sums)
        with exact_arithmetic(there):
            found = gradients_without_sync(batch, stats=with_sums, fused=evaluate)
        error_of_stats = 0.0
        if found.numbers is not None:
            stats = found.numbers.of_groups(found.numbers.values.tolist())
            error_of_stats = _error_of_stats(stats, w, term)
        add_batch(batch, found)
        return gradient_error(out, w, term), error_of_stats


def _error_of_stats(stats: Sequence[GroupStats], w: torch.Tensor, term: PairTerm) -> float:
    """How far off mean energies are, relative to them, and largest cosines."""
    energy = float(oracle_energy(w, term))
    x = unit_rows(w.double())[0]
    cosine = x @ x.mT
    if term.half_space:
        cosine = cosine.abs()
    cosine.diagonal(dim1=1, dim2=2).fill_(-1.0)
    largest = float(cosine.amax())
    errors = [0.0]
    for one in stats:
        errors.append(abs(one.energy - energy) / max(abs(energy), _TINY))
        errors.append(abs(one.cosine - largest))
    return float(torch.tensor(errors).max())  # NaN if one is
