"""What the penalty costs on a GPU: compiled kernels, plain torch and a loop of a peer, beside a training step.

The step is a stand-in: the matrix products of these layers, forward and backward under bf16 autocast, with as many rows
as a step of the model has tokens or pixels (ResNets: 256 images of 224 x 224, convolutions as products of the same FLOP;
ViT-B/16: 256 images; GPT-2: 65536 tokens). It leaves out attention, norms, the loss and the optimizer, so shares of a whole
step are smaller. Rivals take turns; CUDA events keep the time, host included. ``--quick`` runs little and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.shapes import MODELS, Shapes
from benchmarks.timing import save, spread
from lightning_hsu import UniformityRegularizer
from lightning_hsu._core.foreach import add_pair_gradients
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu.measures import RieszEnergy

MEASURE = RieszEnergy(s=2.0)
TOKENS = {"ViT-B/16": 256 * 197, "GPT-2 small": 65536}
EMBEDDING = (50257, 768)


class Layers(nn.Module):
    """Linear layers of given shapes on the GPU, with gradients as if of a task."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, n, bias=False, device="cuda") for n, d in shapes)
        for p in self.parameters():
            p.grad = torch.zeros_like(p)


def rows_of(name: str, n: int, d: int) -> int:
    """Rows that a layer's input has in one step."""
    if name in TOKENS:
        return TOKENS[name]
    if n == 1000:
        return 256
    width = (
        n // 4 if name == "ResNet-50" and d < n else n
    )  # the last convolution of a bottleneck is four times as wide
    side = 112 if d == 147 else 56 * 64 // width
    return 256 * side * side


class Step:
    """The products of a training step, layer by layer, inputs and gradients read from one buffer."""

    def __init__(self, name: str, model: Layers) -> None:
        self.weights = list(model.parameters())
        self.rows = [rows_of(name, *w.shape) for w in self.weights]
        size = max(rows * max(w.shape) for rows, w in zip(self.rows, self.weights, strict=True))
        self.buffer = torch.randn(size, device="cuda", dtype=torch.bfloat16)

    def part(self, rows: int, cols: int) -> Tensor:
        """So much of the buffer."""
        return self.buffer[: rows * cols].view(rows, cols)

    def __call__(self) -> None:
        """Forward and backward."""
        for rows, w in zip(self.rows, self.weights, strict=True):
            x = self.part(rows, w.shape[1]).detach().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                y = nn.functional.linear(x, w)
            torch.autograd.grad(y, (x, w), self.part(rows, w.shape[0]))


def with_backend(name: str, run: Callable[[], object]) -> Callable[[], None]:
    """The same, through one of the back ends."""

    def chosen() -> None:
        os.environ["LIGHTNING_HSU_BACKEND"] = name
        run()

    return chosen


def milliseconds(run: Callable[[], object]) -> float:
    """Time of one run by CUDA events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def turns(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each rival in each round; all run twice before."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in rivals.items():
            times[name].append(milliseconds(run))
    return times


def of_a_model(name: str, shapes: Shapes, rounds: int) -> dict[str, object]:
    """One model: the rivals, their share of the step, and what a side stream hides of the kernels' time."""
    model, side = Layers(shapes), torch.cuda.Stream()
    optimizer, weights = torch.optim.SGD(model.parameters(), lr=1e-9), list(model.parameters())
    regularizer, step = UniformityRegularizer(MEASURE, head=None).attach(model), Step(name, model)
    apart = [GradientUpdate(w.detach()[None], torch.zeros_like(w)[None], 1.0) for w in weights]
    term = MEASURE.pair_term()
    assert term is not None

    def one_after_the_other() -> None:
        step()
        add_pair_gradients(apart, term)

    def side_by_side() -> None:
        side.wait_stream(torch.cuda.current_stream())
        step()
        with torch.cuda.stream(side):
            add_pair_gradients(apart, term)
        torch.cuda.current_stream().wait_stream(side)

    rivals = {
        "triton": with_backend("triton", lambda: regularizer.add_gradients(optimizer)),
        "torch": with_backend("torch", lambda: regularizer.add_gradients(optimizer)),
        "peer": lambda: [peers.wo(w).backward() for w in weights],
        "step": step,
        "kernels": with_backend("triton", lambda: add_pair_gradients(apart, term)),
        "one after the other": with_backend("triton", one_after_the_other),
        "side by side": with_backend("triton", side_by_side),
    }
    times = turns(rivals, rounds)
    found: dict[str, object] = {name: spread(values) for name, values in times.items()}
    for rival in ("triton", "torch", "peer"):
        shares = [100 * a / b for a, b in zip(times[rival], times["step"], strict=True)]
        found[f"{rival}, % of the step"] = spread(shares)
    hidden = zip(times["one after the other"], times["side by side"], times["kernels"], strict=True)
    found["hidden by a side stream, %"] = spread([100 * (a - b) / c for a, b, c in hidden])
    return found


def of_the_embedding(shape: tuple[int, int]) -> dict[str, object]:
    """Peak of memory beside weights and their gradient, and time, of a very large layer."""
    w = torch.randn(1, *shape, device="cuda")
    out, term = torch.zeros_like(w), MEASURE.pair_term()
    assert term is not None
    found: dict[str, object] = {}
    for name in ("triton", "torch"):
        run = with_backend(name, lambda: add_pair_gradients([GradientUpdate(w, out, 1.0)], term))
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[f"{name}, ms"] = spread([milliseconds(run) for _ in range(3)])
        found[f"{name}, peak MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return found


def difference() -> dict[str, object]:
    """Relative difference between the back ends' gradients, which tests can see in the interpreter only."""
    w, term = torch.randn(1, 3072, 768, device="cuda"), MEASURE.pair_term()
    assert term is not None
    outs: dict[str, Tensor] = {}
    for name in ("triton", "torch"):
        outs[name] = torch.zeros_like(w)
        with_backend(
            name, lambda out=outs[name]: add_pair_gradients([GradientUpdate(w, out, 1.0)], term)
        )()
    return {
        "triton from torch, relative": float(
            (outs["triton"] - outs["torch"]).norm() / outs["torch"].norm()
        )
    }


def machine() -> dict[str, str]:
    """Where this runs."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    card = torch.cuda.get_device_name()
    return {"card": card, "driver": driver, "torch": torch.__version__, "triton": version("triton")}


def missing() -> str:
    """What this machine lacks; empty if nothing."""
    if not torch.cuda.is_available():
        return "benchmarks.gpu needs a CUDA device, and torch sees none here"
    return "" if find_spec("triton") else "benchmarks.gpu needs Triton: pip install triton"


def main() -> int:
    """Run all, print it and keep it; 2 where there is nothing to run it on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in miniature, to see that it runs")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    if lack := missing():
        print(lack, file=sys.stderr)
        return 2
    torch.manual_seed(0)
    result: dict[str, object] = {
        "machine": machine(),
        "step": " ".join((__doc__ or "").split()),
        "back ends": difference(),
    }
    print(*result.values(), sep="\n", flush=True)
    for name, shapes in MODELS.items():
        rows = of_a_model(
            name,
            shapes()[:4] if arguments.quick else shapes(),
            1 if arguments.quick else arguments.rounds,
        )
        result[name] = rows
        show(name, rows)
    shape = (3001, 768) if arguments.quick else EMBEDDING
    result["embedding"] = of_the_embedding(shape)
    show(f"{shape[0]} x {shape[1]}", result["embedding"])
    if not arguments.quick:
        save(f"gpu-{re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower())}", result)
    return 0


def show(name: str, rows: dict[str, object]) -> None:
    """Print one part of the table."""
    for what, value in rows.items():
        print(f"{name:12s} {what:28s} {value}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
