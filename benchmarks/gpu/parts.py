"""Which parts there are, in the order of what they are worth if time runs out."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu import (
    correctness,
    embedding,
    launches,
    machine,
    steps,
    sweep,
    trainer,
    trainer_steps,
)
from benchmarks.gpu.runner import Part

BACKENDS = ("torch", "compiled", "cudagraph", "triton")


def parts() -> list[Part]:
    """All parts, with the seconds that they need and may take."""
    found = [Part("machine", machine.describe, least=0, most=60)]
    for backend in BACKENDS:
        act = partial(correctness.check, backend=backend)
        found.append(Part(f"correctness: {backend}", act, 10, 90, checks=backend))
    found.append(Part("Trainer against a plain loop", trainer.compare, 15, 60))
    for backend in BACKENDS:
        act = partial(launches.count, backend=backend)
        found.append(Part(f"launches and waits: {backend}", act, 15, 45))
    for name in ("ResNet-50", "GPT-2 small", "ViT-B/16"):
        found.append(Part(f"real steps: {name}", partial(steps.measure, name=name), 25, 75))
    found.append(Part("an embedding of 50257 x 768", embedding.measure, 10, 40))
    found.append(Part("tiles", sweep.sweep, 15, 70))
    found.append(Part("a Trainer's steps: ResNet-50", trainer_steps.measure, 15, 45))
    return found
