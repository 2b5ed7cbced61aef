"""What the penalty costs beside its floor and beside other ways to it, on a CPU in one thread.

The floor of an exact pair energy with its gradient is 3 n n d FLOP at the rate of a plain float32 matrix product of the same
weights, measured in the same round. ``--quick`` runs everything in miniature and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.shapes import MODELS, Shapes
from benchmarks.timing import machine, peak_mib, quotient, resident_mib, rounds_of, save
from lightning_hsu import UniformityRegularizer
from lightning_hsu._core import lowered_products
from lightning_hsu.measures import (
    GaussianPotential,
    GramDeterminant,
    KoLeo,
    Measure,
    MinimalAngle,
    Orthogonality,
    ResultantLength,
    RieszEnergy,
    Separation,
)

FULL, HALF = RieszEnergy(s=2.0), RieszEnergy(s=2.0, half_space=True)
GOALS = {
    "ResNet-18": (2.0, 3.0),
    "ResNet-50": (2.5, 4.5),
    "ViT-B/16": (3.0, 6.0),
    "GPT-2 small": (3.0, 6.0),
}
WORKSPACE = {"ResNet-50": 24.0, "GPT-2 small": 128.0, "an embedding of 50257 x 768": 512.0}
Row = tuple[str, dict[str, float], str]  # what, the quotients, the goal


class Layers(nn.Module):
    """Linear layers of given shapes, with gradients as if of a task."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, n, bias=False) for n, d in shapes)
        for p in self.parameters():
            p.grad = torch.zeros_like(p)


def products(weights: list[Tensor]) -> None:
    """2 n n d FLOP each: two thirds of the floor."""
    for w in weights:
        torch.mm(w, w.T)


def gradient_of(measure: Measure, w: Tensor) -> Callable[[], Tensor]:
    """One evaluation."""
    return lambda: measure.value_and_grad(w)[1]


def single_layers(quick: bool) -> Iterator[Row]:
    """One large layer: over the floor, and half space against the concatenation of both signs."""
    shapes = [(256, 128)] if quick else [(2304, 768), (3072, 768), (2048, 1024)]
    for n, d in shapes:
        w = torch.randn(n, d)
        rivals = {
            "ours": gradient_of(FULL, w),
            "half": gradient_of(HALF, w),
            "product": lambda w=w: torch.mm(w, w.T),
        }
        times = rounds_of(rivals, 3 if quick else 9)
        yield (
            f"{n} x {d}, full space, over the floor",
            quotient(times, "ours", "product", 1.5),
            "<= 1.25",
        )
        yield (
            f"{n} x {d}, half space, over the floor",
            quotient(times, "half", "product", 1.5),
            "<= 1.25",
        )
    n, d = (256, 128) if quick else (2304, 768)
    w = torch.randn(n, d)
    rivals = {"ours": gradient_of(HALF, w), "peer": lambda: peers.gradient(peers.half_mhe, w)}
    yield (
        f"{n} x {d}, half space, `half_mhe` over ours",
        quotient(rounds_of(rivals, 3), "peer", "ours"),
        ">= 15",
    )


def small_layers(quick: bool) -> Iterator[Row]:
    """Layers of 64 x 576, which a model has many of: alone, and as the engine takes them, those of one shape together."""
    for count in (1, 8):
        w = torch.randn(count, 64, 576)
        rivals = {
            "ours": gradient_of(FULL, w),
            "peer": lambda w=w: [peers.gradient(peers.wo, one) for one in w],
        }
        times = rounds_of(rivals, 5 if quick else 101)
        yield f"{count} of 64 x 576, `wo` over ours", quotient(times, "peer", "ours"), ">= 2.5"


def models(quick: bool) -> Iterator[Row]:
    """Every layer of a model, from the weights to the sum in `.grad`; the peer layer by layer, each freed before the next."""
    for name, shapes in MODELS.items():
        times = rounds_of(
            of_a_model(Layers(shapes()[:4] if quick else shapes())), 1 if quick else 5
        )
        exact, lowered = GOALS[name]
        yield f"{name}, `wo` over ours", quotient(times, "peer", "ours"), f">= {exact:g}"
        yield (
            f"{name}, `wo` over ours, bfloat16 products",
            quotient(times, "peer", "lowered"),
            f">= {lowered:g}",
        )
        yield f"{name}, `wo` over ours in half space", quotient(times, "peer", "half"), ""
        yield f"{name}, over the floor", quotient(times, "ours", "product", 1.5), ""


def of_a_model(model: Layers) -> dict[str, Callable[[], object]]:
    """The engine with both kinds of space, the peer and the products."""
    optimizer, weights = torch.optim.SGD(model.parameters(), lr=1e-9), list(model.parameters())
    full, half = (
        UniformityRegularizer(measure, head=None).attach(model) for measure in (FULL, HALF)
    )
    lowered = UniformityRegularizer(FULL, head=None, matmul_precision="medium").attach(model)
    return {
        "ours": lambda: full.add_gradients(optimizer),
        "half": lambda: half.add_gradients(optimizer),
        "lowered": lambda: lowered.add_gradients(optimizer),
        "peer": lambda: [peers.wo(w).backward() for w in weights],
        "product": lambda: products([w.detach() for w in weights]),
    }


def near_pairs(quick: bool) -> Iterator[Row]:
    """What looking for near pairs costs, with none and with 64 at a chord of 1e-3."""
    n, d = (256, 128) if quick else (2304, 768)
    far = torch.randn(n, d)
    near = far.clone()
    near[-64:] = far[:64] + 1e-3 * torch.randn(64, d)
    times = rounds_of(
        {"far": gradient_of(FULL, far), "near": gradient_of(FULL, near)}, 3 if quick else 15
    )
    yield f"{n} x {d}, 64 near pairs over none", quotient(times, "near", "far"), "<= 1.03"
    asked = torch.randn(min(256, n), n)
    times = rounds_of(
        {"far": gradient_of(FULL, far), "look": lambda: asked.aminmax()}, 3 if quick else 15
    )
    looks = (
        -(-n // 256) / 2
    )  # panels of the upper triangle, each half as long as the first on average
    yield (
        f"{n} x {d}, looking for near pairs where none is, share",
        quotient(times, "look", "far", 1.0 / looks),
        "<= 0.01",
    )


def accuracy(quick: bool) -> Iterator[Row]:
    """Relative error of the gradient against float64, of a layer with 64 near pairs, and with bfloat16 products."""
    n, d = (256, 128) if quick else (1024, 768)
    w = torch.randn(n, d)
    for chord in (1e-2, 1e-3, 1e-4):
        near, aside = w.clone(), torch.nn.functional.normalize(torch.randn(64, d), dim=1)
        near[-64:] = torch.nn.functional.normalize(w[:64], dim=1) + chord * aside
        yield f"{n} x {d}, 64 pairs at a chord of {chord:g}, error", error_of(FULL, near), "<= 1e-6"
    with lowered_products(True):
        for measure, space in ((FULL, "full"), (HALF, "half")):
            yield (
                f"{n} x {d}, bfloat16 products, {space} space, error",
                error_of(measure, w),
                "<= 2e-3",
            )


def error_of(measure: Measure, w: Tensor) -> dict[str, float]:
    """Relative error of the gradient; one number, for it is the same each time."""
    exact = measure.value_and_grad(w.double())[1]
    error = float((measure.value_and_grad(w)[1] - exact).norm() / exact.norm())
    return {"min": error, "median": error, "max": error}


def members(quick: bool) -> Iterator[Row]:
    """Each member over its own floor: products that it cannot do without, at the rate of a product of these weights."""
    n, d = (256, 128) if quick else (1024, 768)
    w = torch.randn(n, d)
    floors: list[tuple[Measure, float, str]] = [  # in units of one product, 2 n n d FLOP
        (RieszEnergy(s=0), 1.5, "3 n n d"),
        (RieszEnergy(s=1, distance="geodesic"), 1.5, "3 n n d"),
        (GaussianPotential(), 1.5, "3 n n d"),
        (Separation(), 0.5, "n n d"),
        (MinimalAngle(), 0.5, "n n d"),
        (KoLeo(), 0.5, "n n d"),
        (Orthogonality("so"), 1.5 * min(n, d) / n, "3 n d min(n, d)"),
        (GramDeterminant(), 1.5 + n / d / 2, "3 n n d + n n n in float64"),
    ]
    for measure, units, floor in floors:
        x = (
            w.double() if "float64" in floor else w
        )  # in float32 its gradient is off by 16 % where chords are 1e-3
        times = rounds_of(
            {"ours": gradient_of(measure, w), "product": lambda x=x: torch.mm(x, x.T)},
            3 if quick else 5,
        )
        yield (
            f"{n} x {d}, {short(measure)}, over {floor}",
            quotient(times, "ours", "product", units),
            "<= 2",
        )
    times = rounds_of(
        {"ours": gradient_of(ResultantLength(), w), "pass": lambda: torch.mul(w, w)},
        5 if quick else 201,
    )
    yield f"{n} x {d}, ResultantLength, over 4 passes", quotient(times, "ours", "pass", 4.0), "<= 2"
    n, d = (256, 128) if quick else (2304, 768)
    plain = torch.randn(n, d)
    w = nn.Parameter(plain)
    for measure in (FULL, HALF):
        times = rounds_of(
            {"ours": energy_of(measure, w), "product": lambda w=plain: torch.mm(w, w.T)},
            3 if quick else 9,
        )
        space = "half" if measure is HALF else "full"
        yield (
            f"{n} x {d}, {space} space, energy alone, over n n d",
            quotient(times, "ours", "product", 0.5),
            "<= 2",
        )


def energy_of(measure: Measure, w: Tensor) -> Callable[[], Tensor]:
    """One evaluation without a gradient."""
    return lambda: torch.no_grad()(measure.penalty)(w)


def short(measure: Measure) -> str:
    """Its name, and what tells it from others of the table."""
    return f"{type(measure).__name__}{' geodesic' if getattr(measure, 'distance', '') == 'geodesic' else ''}"


def workspace(quick: bool) -> Iterator[Row]:
    """Memory beyond weights and `.grad`, in MiB: the growth of a process over one application."""
    for name, goal in WORKSPACE.items():
        if not quick:
            mib = peak_mib("benchmarks.core", "--workspace", name)
            yield (
                f"{name}, MiB beside `.grad`",
                {"min": mib, "median": mib, "max": mib},
                f"<= {goal:g}",
            )


def measure_workspace(name: str) -> None:
    """Print the growth of this process, in which a product of another layer has been computed before."""
    shapes = MODELS[name]() if name in MODELS else [(50257, 768)]
    model = Layers(shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    regularizer = UniformityRegularizer(FULL, head=None, sample_above=None).attach(model)
    small = nn.Linear(64, 64)
    small.weight.grad = torch.zeros_like(small.weight)
    UniformityRegularizer(FULL, head=None).attach(small).add_gradients(
        torch.optim.SGD(small.parameters(), lr=1e-9)
    )
    before = resident_mib()
    regularizer.add_gradients(optimizer)
    print(round(resident_mib() - before, 1))


SECTIONS = [single_layers, models, small_layers, near_pairs, accuracy, members, workspace]


def met(values: dict[str, float], goal: str) -> str:
    """Whether the median meets the goal."""
    if not goal:
        return ""
    sign, number = goal.split()
    median = values["median"]
    return (
        "met"
        if (median <= float(number) if sign == "<=" else median >= float(number))
        else "missed"
    )


def main() -> None:
    """Run all sections, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in miniature, to see that it runs")
    parser.add_argument("--workspace", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.workspace:
        measure_workspace(arguments.workspace)
        return
    rows = []
    print(machine(), flush=True)
    for section in SECTIONS:
        for what, values, goal in section(arguments.quick):
            verdict = "" if arguments.quick else met(values, goal)  # miniatures have no goals
            print(
                f"{what:62s} {values['median']:8.3g}  ({values['min']:.3g} to {values['max']:.3g})  {goal:8s} {verdict}",
                flush=True,
            )
            rows.append({"what": what, **values, "goal": goal, "verdict": verdict})
    if not arguments.quick:
        save("core", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
