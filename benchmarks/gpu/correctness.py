"""Whether a back end adds the right gradients on this device: against differences in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.gpu.machine import brief, require_backend, using
from benchmarks.gpu.runner import Report
from lightning_hsu import UniformityRegularizer
from lightning_hsu._core import PairTerm, oracle_energy
from lightning_hsu._core import backend as backends
from lightning_hsu._core.foreach import add_all_pair_gradients
from lightning_hsu._core.topk import largest_two
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu.measures import GaussianPotential, RieszEnergy
from lightning_hsu.measures.pairwise import PairwiseMeasure

MEASURES = {
    "half": RieszEnergy(s=2.0, half_space=True),
    "full": RieszEnergy(s=2.0),
    "Gaussian": GaussianPotential(),
}
FLOAT32 = 2e-5
"""How far off a gradient may be, relative to its norm. Measured on a CPU: at most 3e-6."""

ROW = 2.0
"""How much further off a single row may be, relative to its own gradient. Measured: 2e-6 at most."""

HALF_PRECISION = 1e-2
"""The same for bfloat16 weights and gradients, which round to 3 digits. Measured: 3e-3."""

RATE = 0.1
STEP_LIMIT = 8e-7


def rows(weight: Tensor) -> Tensor:
    """The neurons of most layers."""
    return weight.flatten(1)


def columns(weight: Tensor) -> Tensor:
    """The neurons of a transposed convolution."""
    return weight.movedim(1, 0).flatten(1)


@dataclass(frozen=True)
class Case:
    """Layers whose gradients are known.

    Args:
        name: What is special about them.
        make: Returns the layers, on the CPU.
        neurons: The neurons (n, d) of a weight; their entries are views of it.
        bound: How far off a gradient may be, relative to its norm.
        limited: Whether a step is limited, by a learning rate on the device.
        needs_card: Whether it takes more than a CPU would do in time.
    """

    name: str
    make: Callable[[], list[nn.Module]]
    neurons: Callable[[Tensor], Tensor] = rows
    bound: float = FLOAT32
    limited: bool = False
    needs_card: bool = False


def linear(*shapes: tuple[int, int]) -> list[nn.Module]:
    """Linear layers with Gaussian neurons (n, d)."""
    layers: list[nn.Module] = []
    for n, d in shapes:
        layer = nn.Linear(d, n, bias=False)
        nn.init.normal_(layer.weight)
        layers.append(layer)
    return layers


def odd() -> list[nn.Module]:
    """Sizes that fill no tile."""
    return linear((65, 70), (130, 33), (3, 7), (2, 9), (1, 5), (97, 129))


def large() -> list[nn.Module]:
    """Sizes of real layers, as far as all differences fit in memory."""
    return linear((768, 256), (1025, 130))


def near() -> list[nn.Module]:
    """Pairs, and opposite pairs, at chords from 1e-1 to 1e-4."""
    layers = linear((130, 40), (70, 11))
    for layer in layers:
        w = layer.weight.data
        for i in range(4):
            step = 10.0 ** -(i + 1) * w[i].norm() * nn.functional.normalize(w[i + 10], dim=0)
            w[60 + i] = 2.0 * (w[i] + step)
            w[20 + i] = -0.5 * (w[i + 30] + step)
    return layers


def dead() -> list[nn.Module]:
    """Zero rows, and rows of unusual norms."""
    layers = linear((67, 20), (129, 66))
    for layer in layers:
        w = layer.weight.data
        w[3] = 0.0
        w[64:66] = 0.0
        w[5] *= 1e-10
        w[6] *= 1e10
    return layers


def bf16() -> list[nn.Module]:
    """Weights and gradients in bfloat16."""
    return [layer.bfloat16() for layer in linear((65, 33), (128, 64))]


def transposed() -> list[nn.Module]:
    """Transposed convolutions, whose neurons are columns."""
    return [nn.ConvTranspose2d(6, 40, 3, bias=False), nn.ConvTranspose2d(70, 33, 2, bias=False)]


def channels_last() -> list[nn.Module]:
    """Convolutions whose channels come last in memory."""
    layers = [nn.Conv2d(12, 50, 3, bias=False), nn.Conv2d(33, 65, 1, bias=False)]
    return [layer.to(memory_format=torch.channels_last) for layer in layers]


CASES = (
    Case("odd shapes", odd),
    Case("near", near),
    Case("dead", dead),
    Case("bf16", bf16, bound=HALF_PRECISION),
    Case("transposed", transposed, columns),
    Case("channels_last", channels_last),
    Case("step limit, learning rate on the device", odd, limited=True),
    Case("large", large, needs_card=True),
)


def check(report: Report, backend: str) -> None:
    """Every case under every measure; and the nearest neighbours."""
    device = report.settings.device
    require_backend(backend, device)
    with using(backend), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for case in CASES:
            if case.needs_card and (device == "cpu" or report.settings.quick):
                continue
            for space, measure in MEASURES.items():
                check_case(report, case, space, measure)
        check_neighbours(report)
        fallen_back = [
            str(one.message) for one in told if "Plain torch computes" in str(one.message)
        ]
        if backend in ("compiled", "triton"):
            report.row(case="trial layer", right=not fallen_back)
    for text in sorted({str(one.message) for one in told}):
        report.note(f"warned: {text}")


def check_case(report: Report, case: Case, space: str, measure: PairwiseMeasure) -> None:
    """One case under one measure; an error that it raises is a wrong result."""
    torch.manual_seed(1)
    layers = [layer.to(report.settings.device) for layer in case.make()]
    weights = [layer.weight for layer in layers]
    expected = [expected_gradient(w, case, measure) for w in weights]
    try:
        taken = add_gradients(layers, case, measure)
    except Exception as error:  # one case says nothing about the others
        report.row(case=case.name, space=space, right=False, error=brief(error))
        return
    error = 0.0
    worst = 0.0
    for w, grad in zip(weights, expected, strict=True):
        off = case.neurons(w.grad).double() - grad
        # Two neurons that are as far apart as can be, or one alone, have no gradient.
        error = max(error, float(off.norm() / grad.norm().clamp_min(1e-6)))
        rows_off = torch.linalg.vector_norm(off, dim=-1)
        lengths = torch.linalg.vector_norm(grad, dim=-1)
        # So that near pairs, whose gradients are long, do not hide the others'.
        usual = float(lengths.median())
        if len(grad) > 2:
            part = rows_off / lengths.clamp_min(0.1 * usual)
            worst = max(worst, float(part.max()))
    right = error <= case.bound and worst <= ROW * case.bound
    report.row(
        case=case.name,
        space=space,
        right=right,
        taken=f"{taken} of {len(layers)}",
        error=error,
        worst_row=worst,
        bound=case.bound,
    )


def add_gradients(layers: Sequence[nn.Module], case: Case, measure: PairwiseMeasure) -> int:
    """Let the engine add the penalty to gradients of zero.

    Returns:
        How many layers go the short way and are taken by the back end.
    """
    model = nn.Sequential(*layers)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rate: Tensor | float = RATE
    if case.limited:
        rate = torch.tensor(RATE, device=next(model.parameters()).device)
    regularizer = UniformityRegularizer(
        measure,
        1.0,
        head=None,
        step_limit=STEP_LIMIT if case.limited else None,
        share_limit=None,
    ).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=True)
    backend = backends.active()
    taken = 0

    def noted(by_term: Mapping[PairTerm, Sequence[GradientUpdate]]) -> None:
        nonlocal taken
        for term, updates in by_term.items():
            taken += sum(backend.takes_update(update, term) for update in updates)
        add_all_pair_gradients(by_term)

    with patch("lightning_hsu._engine.plan.add_all_pair_gradients", noted):
        regularizer.add_gradients(optimizer)
    return taken


def expected_gradient(w: Tensor, case: Case, measure: PairwiseMeasure) -> Tensor:
    """The gradient (n, d) by differences and autograd, in float64."""
    term = measure.pair_term()
    assert term is not None
    x = case.neurons(w.detach()).double()
    if len(x) == 1:
        return torch.zeros_like(x)
    x.requires_grad_()
    energy = oracle_energy(x, term)
    if term.logarithm:
        energy = energy.log()
    (grad,) = torch.autograd.grad(energy, x)
    if case.limited:
        room = STEP_LIMIT / RATE * torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
        length = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
        grad = grad * (room / length.clamp_min(1e-300)).clamp_max(1.0)
    return grad


def check_neighbours(report: Report) -> None:
    """The largest two cosines of every neuron, against a product in float64."""
    x = torch.randn(2, 130, 33, device=report.settings.device)
    x = nn.functional.normalize(x, dim=-1)
    alive = torch.ones_like(x[..., 0], dtype=torch.bool)
    took = backends.active().takes_rows(x)
    first, index, second = largest_two(x, alive, half_space=True, every=True)
    cosine = (x.double() @ x.double().mT).abs()
    cosine.diagonal(dim1=1, dim2=2).fill_(-1.0)
    expected = cosine.topk(2, dim=-1).values
    at_place = cosine.gather(-1, index[..., None])[..., 0]
    found = torch.stack([first, second, at_place.float()], dim=-1).double()
    error = float((found - expected[..., [0, 1, 0]]).abs().max())
    name = "nearest neighbours" if took else "nearest neighbours, by torch"
    report.row(case=name, space="half", right=error <= 1e-6, error=error, bound=1e-6)
