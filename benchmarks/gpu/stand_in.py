"""What the penalty costs on a GPU: compiled kernels, plain torch and a loop of a peer.

All are compared with a training step. The step is a stand-in: the matrix products of these layers,
forward and backward under bf16 autocast, with as many rows as a step of the model has tokens or
pixels (ResNets: 256 images of 224 x 224, convolutions as products of the same FLOP; ViT-B/16: 256
images; GPT-2: 65536 tokens). It leaves out attention, norms, the loss and the optimizer, so shares
of a whole step are smaller. Rivals take turns; CUDA events measure the time, including the host.
``--quick`` runs little and writes nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.gpu.machine import driver, version_of
from benchmarks.shapes import MODELS, Shapes
from benchmarks.timing import save, spread
from lightning_hsu import UniformityRegularizer
from lightning_hsu._core.foreach import add_pair_gradients
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu.measures import RieszEnergy

MEASURE = RieszEnergy(s=2.0)
BACKENDS = ("triton", "torch")
IMAGES = 256
TOKENS = {"ViT-B/16": IMAGES * 197, "GPT-2 small": 65536}
EMBEDDING = (50257, 768)


class Layers(nn.Module):
    """Linear layers of given shapes on the GPU, with gradients as if from a task."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, n, bias=False, device="cuda") for n, d in shapes)
        for p in self.parameters():
            p.grad = torch.zeros_like(p)


def rows_of(name: str, n: int, d: int) -> int:
    """Rows that the input of a model's layer (n, d) has in one step."""
    if name in TOKENS:
        return TOKENS[name]
    if n == 1000:  # the head
        return IMAGES
    if d == 147:  # the first convolution
        return IMAGES * 112 * 112
    width = n
    if name == "ResNet-50" and d < n:  # the last convolution of a bottleneck is four times as wide
        width = n // 4
    side = 56 * 64 // width
    return IMAGES * side * side


class Step:
    """The products of a training step, layer by layer; inputs and gradients share one buffer."""

    def __init__(self, name: str, model: Layers) -> None:
        self.weights = list(model.parameters())
        self.rows = [rows_of(name, *w.shape) for w in self.weights]
        size = 0
        for rows, w in zip(self.rows, self.weights, strict=True):
            size = max(size, rows * max(w.shape))
        self.buffer = torch.randn(size, device="cuda", dtype=torch.bfloat16)

    def part(self, rows: int, cols: int) -> Tensor:
        """The start of the buffer, as a matrix (rows, cols)."""
        return self.buffer[: rows * cols].view(rows, cols)

    def __call__(self) -> None:
        """Run forward and backward."""
        for rows, w in zip(self.rows, self.weights, strict=True):
            x = self.part(rows, w.shape[1]).detach().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                y = nn.functional.linear(x, w)
            torch.autograd.grad(y, (x, w), self.part(rows, w.shape[0]))


def with_backend(name: str, run: Callable[[], object]) -> Callable[[], None]:
    """A function that runs ``run`` with one of the back ends."""

    def chosen() -> None:
        os.environ["LIGHTNING_HSU_BACKEND"] = name
        run()

    return chosen


def milliseconds(run: Callable[[], object]) -> float:
    """Time of one run by CUDA events."""
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def rounds_of(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each rival in each round, by name, after two warm-up runs each."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in rivals.items():
            times[name].append(milliseconds(run))
    return times


def of_a_model(name: str, shapes: Shapes, rounds: int) -> dict[str, object]:
    """Times of one model's rivals and their shares of the step.

    Also, how much of the kernels' time a side stream hides behind the step.
    """
    times = rounds_of(rivals_for(name, Layers(shapes)), rounds)
    found: dict[str, object] = {rival: spread(values) for rival, values in times.items()}
    for rival in ("triton", "torch", "peer"):
        shares = []
        for milliseconds_of_rival, step in zip(times[rival], times["step"], strict=True):
            shares.append(100 * milliseconds_of_rival / step)
        found[f"{rival}, % of the step"] = spread(shares)
    hidden = []
    for in_turn, at_once, kernels in zip(
        times["one after the other"], times["side by side"], times["kernels"], strict=True
    ):
        hidden.append(100 * (in_turn - at_once) / kernels)
    found["hidden by a side stream, %"] = spread(hidden)
    return found


def rivals_for(name: str, model: Layers) -> dict[str, Callable[[], object]]:
    """The engine with each back end, the peer, the step, the kernels, and both on two streams."""
    step = Step(name, model)
    side = torch.cuda.Stream()
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    regularizer = UniformityRegularizer(MEASURE, head=None, share_limit=None).attach(model)
    updates = [GradientUpdate(w.detach()[None], torch.zeros_like(w)[None], 1.0) for w in weights]
    term = MEASURE.pair_term()
    assert term is not None

    def apply() -> None:
        regularizer.add_gradients(optimizer)

    def peer() -> None:
        for w in weights:
            peers.wo(w).backward()

    def kernels() -> None:
        add_pair_gradients(updates, term)

    def one_after_the_other() -> None:
        step()
        kernels()

    def side_by_side() -> None:
        side.wait_stream(torch.cuda.current_stream())
        step()
        with torch.cuda.stream(side):
            kernels()
        torch.cuda.current_stream().wait_stream(side)

    return {
        "triton": with_backend("triton", apply),
        "torch": with_backend("torch", apply),
        "peer": peer,
        "step": step,
        "kernels": with_backend("triton", kernels),
        "one after the other": with_backend("triton", one_after_the_other),
        "side by side": with_backend("triton", side_by_side),
    }


def of_the_embedding(shape: tuple[int, int]) -> dict[str, object]:
    """Time of a very large layer, and its peak memory besides the weights and their gradient."""
    w = torch.randn(1, *shape, device="cuda")
    update = GradientUpdate(w, torch.zeros_like(w), 1.0)
    term = MEASURE.pair_term()
    assert term is not None
    found: dict[str, object] = {}
    for name in BACKENDS:
        run = with_backend(name, lambda: add_pair_gradients([update], term))
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[f"{name}, ms"] = spread([milliseconds(run) for _ in range(3)])
        peak = torch.cuda.max_memory_allocated() - before
        found[f"{name}, peak MiB"] = round(peak / 2**20, 1)
    return found


def difference() -> dict[str, object]:
    """Relative difference between the back ends' gradients; tests only check the interpreter's."""
    w = torch.randn(1, 3072, 768, device="cuda")
    term = MEASURE.pair_term()
    assert term is not None
    grads: dict[str, Tensor] = {}
    for name in BACKENDS:
        grads[name] = torch.zeros_like(w)
        update = GradientUpdate(w, grads[name], 1.0)
        with_backend(name, lambda update=update: add_pair_gradients([update], term))()
    error = (grads["triton"] - grads["torch"]).norm() / grads["torch"].norm()
    return {"triton from torch, relative": float(error)}


def machine() -> dict[str, str]:
    """The GPU and the versions that the benchmark runs with."""
    return {
        "card": torch.cuda.get_device_name(),
        "driver, clocks": driver(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }


def missing() -> str:
    """What this machine lacks; empty if nothing."""
    if not torch.cuda.is_available():
        return "benchmarks.gpu needs a CUDA device, and torch sees none here"
    if not find_spec("triton"):
        return "benchmarks.gpu needs Triton: pip install triton"
    return ""


def run(rounds: int, *, quick: bool) -> int:
    """Run everything, print it and save it; return 2 on a machine that cannot run it."""
    lack = missing()
    if lack:
        print(lack, file=sys.stderr)
        return 2
    torch.manual_seed(0)
    result: dict[str, object] = {
        "machine": machine(),
        "step": " ".join((__doc__ or "").split()),
        "back ends": difference(),
    }
    print(*result.values(), sep="\n", flush=True)
    for name, shapes_of in MODELS.items():
        shapes = shapes_of()
        if quick:
            shapes = shapes[:4]
            rounds = 1
        rows = of_a_model(name, shapes, rounds)
        result[name] = rows
        show(name, rows)
    n, d = (3001, 768) if quick else EMBEDDING
    embedding = of_the_embedding((n, d))
    result["embedding"] = embedding
    show(f"{n} x {d}", embedding)
    if not quick:
        card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        save(f"gpu-{card}", result)
    return 0


def show(name: str, rows: dict[str, object]) -> None:
    """Print one part of the table."""
    for what, value in rows.items():
        print(f"{name:12s} {what:28s} {value}", flush=True)
